"""How render-2-limited and render-3 were made: a record, like make_formats.py.

render-2-limited/    version 2, by commit f2986b3: a render whose archive is full, which version 2
                     wrote with its evicted blocks, as zeros
render-3/            version 3, by the commit that adds this file: the same render, each block of
                     the archive in a file of its own

    python make_render_3.py OUT
"""

import sys
from contextlib import suppress
from pathlib import Path

from packforcing.errors import RenderStopped
from packforcing.runtime import Session

HERE = Path(__file__).parent
PROMPT = "a red star over navy stripes"


def main(out: Path) -> None:
    with Session.open(HERE / "bundle-3", threads=1) as session:

        def stop(info):
            if info.index == 8:
                session.stop()

        with suppress(RenderStopped):
            session.render(
                PROMPT, 15, out.with_name("film.mp4"), 5, archive_limit=4, on_block=stop,
                checkpoint_seconds=3.0,
            )  # fmt: skip
    out.with_name("film.mp4.render").rename(out)
    (out / "lock").unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
