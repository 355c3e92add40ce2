"""Rows of numbers in ggml's K-blocks, which the `gguf` package reads and does not write.

The layouts are those of gguf-py `quants.py`; the search for the best scales that llama.cpp makes is left out.
"""

import gguf
import numpy

QUANTS = gguf.GGMLQuantizationType


def quantise(values: numpy.ndarray, kind) -> numpy.ndarray:
    """Bytes `[rows, ...]` of `values [rows, columns]`; columns are a multiple of 256."""
    rows, columns = values.shape
    blocks = values.reshape(-1, 256).astype(numpy.float32)
    written = {QUANTS.Q4_K: lambda b: with_minima(b, 4), QUANTS.Q5_K: lambda b: with_minima(b, 5), QUANTS.Q6_K: q6}[kind](blocks)
    return written.reshape(rows, -1)


def with_minima(blocks: numpy.ndarray, bits: int) -> numpy.ndarray:
    """Eight groups of 32, each with a scale and a minimum of six bits."""
    groups = blocks.reshape(-1, 8, 32)
    low = numpy.minimum(groups.min(axis=2), 0)
    step = (groups.max(axis=2) - low) / (2**bits - 1)
    scale = half(step.max(axis=1, keepdims=True) / 63)
    minimum = half((-low).max(axis=1, keepdims=True) / 63)
    steps, minima = six_bits(step, scale), six_bits(-low, minimum)
    width = (scale.astype(numpy.float32) * steps)[..., None]
    offset = (minimum.astype(numpy.float32) * minima)[..., None]
    numbers = numpy.divide(groups + offset, width, out=numpy.zeros_like(groups), where=width > 0)
    numbers = numbers.round().clip(0, 2**bits - 1).astype(numpy.uint8)
    parts = [scale.view(numpy.uint8), minimum.view(numpy.uint8), packed_scales(steps, minima)]
    if bits == 5:
        high = numbers >> 4
        parts.append(sum(high[:, group] << numpy.uint8(group) for group in range(8)).astype(numpy.uint8))
    low_bits = numbers & 0x0F
    parts.append((low_bits[:, 0::2] | (low_bits[:, 1::2] << 4)).reshape(len(groups), -1))
    return numpy.concatenate(parts, axis=1)


def half(values: numpy.ndarray) -> numpy.ndarray:
    return values.astype(numpy.float16)


def six_bits(values: numpy.ndarray, unit: numpy.ndarray) -> numpy.ndarray:
    unit = unit.astype(numpy.float32)
    found = numpy.divide(values, unit, out=numpy.zeros_like(values), where=unit > 0)
    return found.round().clip(0, 63).astype(numpy.uint8)


def packed_scales(steps: numpy.ndarray, minima: numpy.ndarray) -> numpy.ndarray:
    """Twelve bytes of eight scales and eight minima."""
    first = (steps[:, :4] & 0x3F) | ((steps[:, 4:] >> 4) << 6)
    second = (minima[:, :4] & 0x3F) | ((minima[:, 4:] >> 4) << 6)
    third = (steps[:, 4:] & 0x0F) | ((minima[:, 4:] & 0x0F) << 4)
    return numpy.concatenate([first, second, third], axis=1)


def q6(blocks: numpy.ndarray) -> numpy.ndarray:
    """Sixteen groups of 16, each with a scale of eight bits."""
    groups = blocks.reshape(-1, 16, 16)
    step = numpy.abs(groups).max(axis=2) / 31
    scale = half(step.max(axis=1, keepdims=True) / 127)
    unit = scale.astype(numpy.float32)
    steps = numpy.divide(step, unit, out=numpy.zeros_like(step), where=unit > 0).round().clip(0, 127)
    width = (unit * steps)[..., None]
    numbers = numpy.divide(groups, width, out=numpy.zeros_like(groups), where=width > 0)
    numbers = (numbers.round().clip(-32, 31) + 32).astype(numpy.uint8).reshape(len(groups), 2, 4, 32)
    low, high = numbers & 0x0F, numbers >> 4
    low = numpy.concatenate([low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], axis=2)
    high = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    parts = [low.reshape(len(groups), -1), high.reshape(len(groups), -1)]
    return numpy.concatenate([*parts, steps.astype(numpy.int8).view(numpy.uint8), scale.view(numpy.uint8)], axis=1)
