"""Images as sequences: intensities x [B, ...] of 0..1 become [T, B, ...], time first."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["direct", "latency", "poisson"]


def direct(images: Tensor, timesteps: int) -> Tensor:
    """The same image at every step: out[t] = x.

    A view with stride 0 along time, of any values and dtype: nothing is copied, so do not write into it. The first
    convolution makes spikes of it (Rueckauer et al. 2017, doi 10.3389/fnins.2017.00682).

    Args:
        images: [B, ...].
        timesteps: T.

    Returns:
        [T, B, ...].

    Raises:
        TypeError, ValueError: no tensor, or no T of at least 1.
    """
    _check_shape("direct", images, timesteps)
    return images.unsqueeze(0).expand(timesteps, *images.shape)


def poisson(images: Tensor, timesteps: int, generator: torch.Generator, check: bool = True) -> Tensor:
    """Rate coding: independent spikes with the intensity as their probability::

        out[t] = 1[u_t < x],   u_t ~ U[0, 1),   so P(out[t] = 1) = x

    the Bernoulli process that approximates a Poisson process of rate x per step. 0 never fires and 1 always does;
    u has 24 random bits.

    Args:
        images: [B, ...] of 0..1, floating point.
        timesteps: T.
        generator: draws on its own device. One on the CPU gives the same spikes for images on any device; one on the
            images' device spares the transfer.
        check: refuse values outside of 0..1, which waits for a GPU.

    Returns:
        [T, B, ...] of 0 and 1 in the dtype of the images.

    Raises:
        TypeError, ValueError: no floating-point tensor, no T of at least 1, or values outside of 0..1.
    """
    _check_shape("poisson", images, timesteps)
    _check_intensities("poisson", images, check)
    drawn = torch.rand((timesteps, *images.shape), dtype=torch.float32, device=generator.device, generator=generator)
    return (drawn.to(images.device) < images).to(images.dtype)


def latency(images: Tensor, timesteps: int, threshold: float = 0.0, check: bool = True) -> Tensor:
    """Time to first spike: one spike a pixel, the earlier the brighter (Thorpe and Gautrais 1998)::

        out[t] = 1[t = t*(x)],   t*(x) = min(T - 1, floor(T (1 - x)))   for x > threshold, never otherwise

    so that each step stands for 1/T of the intensities, the first one for the brightest.

    Args:
        images: [B, ...] of 0..1, floating point.
        timesteps: T.
        threshold: intensities up to this one stay silent, of 0..1.
        check: refuse values outside of 0..1, which waits for a GPU.

    Returns:
        [T, B, ...] of 0 and 1 in the dtype of the images.

    Raises:
        TypeError, ValueError: no floating-point tensor, no T of at least 1, values or a threshold outside of 0..1.
    """
    _check_shape("latency", images, timesteps)
    _check_intensities("latency", images, check)
    if not 0 <= threshold <= 1:
        raise ValueError(f"encode: latency: expected a threshold of 0 to 1, got {threshold}")
    exact = images if images.dtype == torch.float64 else images.float()
    when = (timesteps * (1 - exact)).floor().clamp(max=timesteps - 1)
    steps = torch.arange(timesteps, device=images.device).view(-1, *(1,) * images.dim())
    return ((steps == when) & (exact > threshold)).to(images.dtype)


def _check_shape(name: str, images: Tensor, timesteps: int) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"encode: {name}: expected images as a tensor, got {type(images).__name__}")
    if isinstance(timesteps, bool) or not isinstance(timesteps, int) or timesteps < 1:
        raise ValueError(f"encode: {name}: expected timesteps as an integer of at least 1, got {timesteps!r}")


def _check_intensities(name: str, images: Tensor, check: bool) -> None:
    if not images.is_floating_point():
        raise TypeError(
            f"encode: {name}: expected floating-point images of 0..1, got {images.dtype}; divide raw pixels by their "
            f"largest value, as in images / 255"
        )
    if check and images.numel() and not bool(((images >= 0) & (images <= 1)).all()):
        low, high = (float(part) for part in images.aminmax())
        raise ValueError(
            f"encode: {name}: expected images of 0..1, got values of {low:g} to {high:g}; encode before normalising"
        )
