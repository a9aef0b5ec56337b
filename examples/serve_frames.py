"""Serve live videos to browsers, as Motion JPEG: an asyncio service.

    python examples/serve_frames.py --port 8000

http://127.0.0.1:8000/?prompt=a+red+star+over+sand shows a video that ends when its viewer leaves.
Each viewer has a video. Needs `pip install "packforcing[cpu]"`, and no torch.
"""

from __future__ import annotations

import argparse
import asyncio
import io
from contextlib import suppress
from functools import partial
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from packforcing import PackForcingError
from packforcing.runtime import Session, demo_bundle

HEADER = b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n"
PART = b"--frame\r\nContent-Type: image/jpeg\r\n\r\n%b\r\n"


async def serve_viewer(
    session: Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Send frames at the video's rate until the viewer leaves."""
    with suppress(ConnectionError, asyncio.IncompleteReadError, IndexError):
        request = await reader.readuntil(b"\r\n\r\n")
        query = parse_qs(urlsplit(request.split()[1].decode()).query)
        try:
            video = session.begin(query.get("prompt", ["a red star over navy stripes"])[0])
        except PackForcingError as error:
            writer.write(b"HTTP/1.0 400 Bad Request\r\n\r\n" + str(error).encode())
        else:
            writer.write(HEADER)
            with video:
                async for block in video:
                    for frame in block.frames:
                        Image.fromarray(frame).save(jpeg := io.BytesIO(), "jpeg", quality=90)
                        writer.write(PART % jpeg.getvalue())
                        await writer.drain()  # slow viewers slow their own video alone
                        await asyncio.sleep(1 / session.config.fps)
    writer.close()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--bundle", default=demo_bundle())
    args = parser.parse_args()
    with Session.open(args.bundle) as session:
        serve = partial(serve_viewer, session)
        async with await asyncio.start_server(serve, "127.0.0.1", args.port) as server:
            print(f"http://127.0.0.1:{args.port}/?prompt=a+red+star+over+sand", flush=True)
            await server.serve_forever()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
