"""A digit in any picture, prepared as the digits were that a network was trained on.

A picture may have any size and colours, and be light on dark or dark on light. Its border says what the
background is, and ink is how far a pixel is from it. The ink is then cut out and fitted

- for MNIST as its makers did (http://yann.lecun.com/exdb/mnist/): into 20x20 pixels, with its proportions
  kept, and with its centre of mass in the middle of 28x28 pixels. Networks that see MNIST in 16x16 pixels
  see that, shrunk by prepro.py. Procedural digits (strokes) have about the same size and place.
- for USPS as in 1989: into 16x16 pixels, and set upright. The page on which one draws does the same.

There should be one digit in a picture, and nothing else: no frame, no lines, no shadow over a part of it.
"""

import numpy as np
import torch
import torch.nn.functional as F

import prepro
import utils

LARGEST = 400  # pixels of a side beyond which a picture is shrunk first, which also averages noise
FAINT = 0.1  # of the ink: less is no ink, but blur, or traces of JPEG
CONTRAST = 0.1  # of the range from black to white: a picture with less is empty
FINE = 4  # points that are averaged for a pixel of the 16x16, in each direction
STEEPEST = 1.0  # slant that is still undone: 45 degrees


def read_digit(path, data, side=16):
    """The digit in a picture, for a network that was trained on `data`: mnist, usps or strokes.

    Returns pixels (side, side) from 0 (background) to 1, where 28 is for whole MNIST, and how the picture was
    read: "dark on light" or "light on dark". BadRequest where there is no digit in the file.
    """
    ink, how = find_ink(read_grey(path), path)
    if data == "usps":
        return normalise(torch.from_numpy(ink)[None])[0].numpy() / 2 + 0.5, how
    digit = fit(ink)
    if side == 28:
        return digit / 255, how
    return prepro.shrink(torch.from_numpy(digit)[None])[0].numpy() / 2 + 0.5, how


def read_grey(path):
    """The grey levels (height, width), float32 from 0 to 1, of an upright picture; at most LARGEST a side."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.draft("L", (LARGEST, LARGEST))  # a JPEG can be read at half its size, or less
            image = ImageOps.exif_transpose(image)  # cameras note which side is up
            if image.mode.startswith("I"):  # 16 bits
                image = Image.fromarray(np.asarray(image, np.float32) / 257)
            elif "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("LA")
                grey, opaque = np.asarray(image, np.float32).transpose(2, 0, 1)
                ink_is_dark = (grey * opaque).sum() <= 127.5 * opaque.sum()
                paper = Image.new("L", image.size, 255 if ink_is_dark else 0)
                paper.paste(image.getchannel("L"), mask=image.getchannel("A"))
                image = paper
            image = image.convert("F")
            shrunk = [max(1, round(side * LARGEST / max(image.size))) for side in image.size]
            if max(image.size) > LARGEST:
                image = image.resize(shrunk, Image.Resampling.BOX)
            return np.asarray(image, np.float32) / 255
    except FileNotFoundError as error:
        raise utils.BadRequest(f"{path} does not exist: name a picture") from error
    except Exception as error:  # a damaged picture raises errors of a dozen types
        why = getattr(error, "strerror", None) or type(error).__name__
        raise utils.BadRequest(
            f"{path} is no picture that can be read ({why}): save it as PNG or JPEG"
        ) from error


def find_ink(grey, path="the picture"):
    """Ink (height, width) from 0 to 1 in grey levels, and whether it is dark or light."""
    difference = grey - background(grey)
    dark = -difference.min() >= difference.max()
    ink = np.maximum(0, -difference if dark else difference)
    if not ink.max() >= CONTRAST:
        raise utils.BadRequest(f"{path} is empty: nothing in it differs from its border")
    noise = 1.4826 * np.median(np.abs(border(difference)))  # a robust standard deviation
    full = np.median(ink[ink >= ink.max() / 2])  # and not the maximum, which may be a speck
    ink[ink < max(FAINT * full, min(0.5 * full, 6 * noise))] = 0  # a speck would move the box
    return np.minimum(ink / full, 1), "dark on light" if dark else "light on dark"


def border(pixels):
    """The outermost pixels of (height, width), in the order of `background`."""
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


def background(grey):
    """The grey levels that there would be without ink: a plane, since paper is lighter near the lamp.

    It has the least absolute deviation from the border, so ink that touches the border does not move it.
    """
    height, width = grey.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    places = np.stack([np.ones_like(y), y, x], axis=-1)
    levels, known = border(grey).astype(np.float64), border(places)
    plane = np.array([np.median(levels), 0, 0])
    for _ in range(20):  # iteratively reweighted least squares
        weights = 1 / np.maximum(np.abs(levels - known @ plane), 1e-3)[:, None]
        plane = np.linalg.lstsq(weights**0.5 * known, weights[:, 0] ** 0.5 * levels, rcond=None)[0]
    return (places @ plane).astype(np.float32)


def fit(ink):
    """MNIST's way: (28, 28) whole numbers from 0 to 255, float32, of ink (height, width) from 0 to 1."""
    from PIL import Image

    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    cut = Image.fromarray(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    size = [max(1, round(20 * side / max(cut.size))) for side in cut.size]
    small = np.asarray(cut.resize(size, Image.Resampling.BOX))
    digit = np.zeros((28, 28), np.float32)
    corner = []
    for axis, side in enumerate(small.shape):
        mass = small.sum(axis=1 - axis)
        middle = (mass * np.arange(side)).sum() / mass.sum()
        corner.append(int(np.clip(np.floor(14 - middle + 0.5), 0, 28 - side)))
    digit[corner[0] : corner[0] + small.shape[0], corner[1] : corner[1] + small.shape[1]] = small
    return np.round(255 * digit)


def normalise(ink):
    """Digits (n, 16, 16) from -1 to 1 of `ink` (n, height, width) from 0 to 1: upright, fitted, centred."""
    n, height, width = ink.shape
    y = torch.arange(height, dtype=torch.float64)[:, None]
    x = torch.arange(width, dtype=torch.float64)
    ink = ink.double()
    mass = ink.sum(dim=(1, 2)).clamp(min=1e-9)
    middle_y, middle_x = (ink * y).sum(dim=(1, 2)) / mass, (ink * x).sum(dim=(1, 2)) / mass
    dy, dx = y - middle_y[:, None, None], x - middle_x[:, None, None]
    slant = (ink * dy * dx).sum(dim=(1, 2)) / (ink * dy * dy).sum(dim=(1, 2)).clamp(min=1e-9)
    slant = slant.clamp(-STEEPEST, STEEPEST)[:, None, None]

    # The envelope of the upright digit: the least and greatest u = x - slant * dy, and y, where there is ink.
    inked = ink >= 0.5
    upright = x - slant * dy
    low_u = upright.masked_fill(~inked, torch.inf).amin(dim=(1, 2)) - 0.5
    high_u = upright.masked_fill(~inked, -torch.inf).amax(dim=(1, 2)) + 0.5
    rows = y.expand(n, height, width)
    low_y = rows.masked_fill(~inked, torch.inf).amin(dim=(1, 2)) - 0.5
    high_y = rows.masked_fill(~inked, -torch.inf).amax(dim=(1, 2)) + 0.5
    step = torch.maximum(high_u - low_u, high_y - low_y) / (16 * FINE)  # between two points, in pixels

    places = torch.arange(16 * FINE, dtype=torch.float64) - (16 * FINE - 1) / 2
    read_y = ((low_y + high_y)[:, None] / 2 + step[:, None] * places)[:, :, None]
    read_u = ((low_u + high_u)[:, None] / 2 + step[:, None] * places)[:, None, :]
    read_x = read_u + slant * (read_y - middle_y[:, None, None])
    where = torch.stack(
        torch.broadcast_tensors(2 * read_x / (width - 1) - 1, 2 * read_y / (height - 1) - 1), -1
    )
    where = where.nan_to_num(2, 2, 2).float()  # of a blank sheet, somewhere outside
    ink = ink[:, None].float()
    points = F.grid_sample(ink, where, mode="bilinear", padding_mode="zeros", align_corners=True)
    return 2 * F.avg_pool2d(points, FINE)[:, 0] - 1
