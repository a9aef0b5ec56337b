"""Score `packforcing.evaluation.demo_judge` on drawn and on autoencoded clips."""

from __future__ import annotations

import argparse
import itertools
from collections import Counter

import numpy as np
from world import make_clip, make_tour

from packforcing.evaluation.demo_judge import loop_closure, matches, view_error, visits


def _score(name: str, clips: list[tuple[str, np.ndarray]]) -> None:
    right: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for i, (prompt, frames) in enumerate(clips):
        right.update(kind for kind, ok in matches(prompt, frames).items() if ok)
        other = clips[(i + len(clips) // 2) % len(clips)][0]
        wrong.update(kind for kind, ok in matches(other, frames).items() if ok)
    for label, counter in (("own prompt", right), ("another clip's prompt", wrong)):
        line = ", ".join(f"{kind} {counter[kind] / len(clips):.2f}"
                         for kind in ("color", "ground", "both", "shape"))  # fmt: skip
        print(f"{name}, {label}: {line}")


def _score_tours(name: str, tours: list[tuple[str, np.ndarray]]) -> None:
    """Returns to a tour's own places, and views of two tours over one ground: forgetting."""
    own = [error for prompt, frames in tours for error in loop_closure(prompt, frames)]
    seen = [list(visits(prompt, frames)) for prompt, frames in tours]
    foreign = [view_error(a, b) for here, there in itertools.combinations(seen, 2)
               for a in here for b in there if a.place == b.place]  # fmt: skip
    print(f"{name}, {len(tours)} tours, {len(own)} returns: loop-closure error {np.mean(own):.3f}, "
          f"another tour's landmarks {np.mean(foreign):.3f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--autoencoder", help="weights: also judge clips that went through it")
    parser.add_argument("--clips", type=int, default=60)
    args = parser.parse_args()
    rng = np.random.default_rng(99)
    clips = [make_clip(rng, 80)[:2] for _ in range(args.clips)]
    tours = [make_tour(rng, 2 * 80)[:2] for _ in range(args.clips // 2)]
    _score("drawn", clips)
    _score_tours("drawn", tours)
    if args.autoencoder:
        import torch
        from train_autoencoder import load_autoencoder

        model = load_autoencoder(args.autoencoder)

        @torch.inference_mode()
        def there_and_back(frames: np.ndarray) -> np.ndarray:
            pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].contiguous() / 255.0
            out = model.decode(model.encode(pixels))[0].clamp(0, 1).permute(0, 2, 3, 1)
            return (out * 255).round().to(torch.uint8).numpy()

        _score("decoded", [(prompt, there_and_back(frames)) for prompt, frames in clips])
        _score_tours("decoded", [(prompt, there_and_back(frames)) for prompt, frames in tours])


if __name__ == "__main__":
    main()
