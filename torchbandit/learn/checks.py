"""What the options of an algorithm must be: errors that name the option."""

from __future__ import annotations

from torchbandit.losses.choices import ClipAs, check_dual_clip, log_bounds


def check_clips(
    clip: float | None, clip_high: float | None, dual_clip: float | None = None, clip_as: ClipAs = "min"
) -> None:
    """ValueError for a ratio clip that leaves nothing to learn, or a dual clip that is none or goes with no clip."""
    log_bounds(clip, clip_high)
    check_dual_clip(dual_clip, clip_as)


def at_least(least: float, **options: float | None) -> None:
    """ValueError for an option below `least`, or NaN; None passes."""
    for name, value in options.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name}: must be at least {least:g}, got {value}")


def within(low: float, high: float, **options: float) -> None:
    """ValueError for an option outside [low, high], or NaN."""
    for name, value in options.items():
        at_least(low, **{name: value})
        if value > high:
            raise ValueError(f"{name}: must be at most {high:g}, got {value}")
