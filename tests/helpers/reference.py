"""The quantizers once more in plain numpy, float64, written from the formulas and not from the code under test."""

import numpy as np


def affine(x, scale, zero, low, high, rounding=None):
    """Value, d/dx, d/dscale (per element, LSQ) and d/drounding."""
    u = x / scale
    level = (np.rint(u) if rounding is None else np.floor(u) + rounding) + zero
    value = scale * (np.clip(level, low, high) - zero)
    if rounding is None:
        inside = (u + zero > low - 0.5) & (u + zero < high + 0.5)
    else:
        inside = (level >= low) & (level <= high)
    return value, inside * 1.0, value / scale - inside * u, inside * scale


def log_levels(mode, k, off, count):
    yh = np.arange(count) + 0.5
    return {
        'log1p': lambda: off * (2 ** (yh / k) - 1),
        'exact': lambda: 2 ** ((yh - off) / k),
        'shift': lambda: 2 ** (yh - off),
    }[mode]()


def log_bins(mode, k, off, level, mag):
    """Floor(y) within the codes, but never beyond a quarter of the gap to either neighbour of the rounded table."""
    c = np.zeros_like(mag)
    for code in range(1, len(level)):
        edge = off * (2 ** (code / k) - 1) if mode == 'log1p' else 2 ** ((code - off) / k)
        if mode != 'shift':
            gap = level[code] - level[code - 1]
            edge = min(max(edge, level[code - 1] + gap / 4), level[code] - gap / 4)
        c[mag >= edge] = code
    return c


def log_affine(w, mu, s, k, off, mode, count, rounding=None, continuous=False):
    """Value and gradients for one channel; k and off are pairs (side >= 0, side < 0).

    ``continuous=True`` leaves out every rounding, for finite differences: the code is y - 1/2 shifted by a constant.
    """
    d = (w - mu) / s
    side = (d < 0).astype(int)
    sigma, mag = 1 - 2 * side, np.abs(d)
    k_, off_ = np.asarray(k)[side], np.asarray(off)[side]
    y = k_ * np.log2(1 + mag / off_) if mode == 'log1p' else k_ * np.log2(mag) + off_
    tops = max(log_levels(mode, k[i], off[i], count)[-1] for i in (0, 1))
    step = tops / 127
    table = np.stack([np.rint(log_levels(mode, k[i], off[i], count) / step) for i in (0, 1)])
    if rounding is None:
        c, m = np.empty_like(y), (y >= 0) & (y < count)
        for i in (0, 1):
            c[side == i] = log_bins(mode, k[i], off[i], step * table[i], mag[side == i])
    else:
        raw = np.floor(y - 0.5) + rounding
        c, m = np.clip(raw, 0, count - 1), (raw >= 0) & (raw <= count - 1)
    yh = c + 0.5
    if mode == 'log1p':
        dh = off_ * (2 ** (yh / k_) - 1)
        dw = m * (dh + off_) / (mag + off_)
        dk = sigma * (dh + off_) * np.log(2) / k_**2 * (m * y - yh)
        doff = sigma / off_ * (dh - m * mag * (dh + off_) / (mag + off_))
        dround = m * sigma * (dh + off_) * np.log(2) / k_
    elif mode == 'exact':
        dh = 2 ** ((yh - off_) / k_)
        dw = m * dh / mag
        dk = sigma * dh * np.log(2) / k_**2 * (m * (y - off_) - (yh - off_))
        doff = sigma * dh * np.log(2) / k_ * (m - 1.0)
        dround = m * sigma * dh * np.log(2) / k_
    else:
        dh = 2 ** (yh - off_)
        dw = m * dh * k_ / mag
        dk = sigma * dh * np.log(2) * m * (y - off_) / k_
        doff = sigma * dh * np.log(2) * (m - 1.0)
        dround = m * sigma * dh * np.log(2)
    whole = c == np.rint(c)
    value = mu + s * sigma * np.where(whole, step * table[side, np.rint(c).astype(int)], dh)
    if mu:  # one int8 grid through zero in each channel
        scale = np.abs(mu + s * step * np.concatenate([-table[1], table[0]])).max() / 127
        value = np.where(whole, scale * np.rint(value / scale), value)
    return dict(
        value=value,
        w=dw,
        mu=1 - dw,
        s=sigma * dh - d * dw,
        k=s * dk,
        off=s * doff,
        rounding=s * dround,
        side=side,
        y=y,
        inside=m,
        code=yh,
    )
