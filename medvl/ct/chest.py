"""Whether a volume looks like a chest CT: by how much lung it shows, and how far up and down."""

import torch
import torch.nn.functional as F

from medvl.ct import preprocess
from medvl.ct.preprocess import Volume

_LEAST_ML = 300
_LEAST_MM = 100  # of height, on each side


def doubt_chest(volume: Volume) -> str:
    """Why a volume does not look like a chest CT, in a sentence; "" where it does.

    Lung is tissue of -950 to -600 HU that is a pixel (5 mm) or more away from anything else. A chest shows 300
    ml of it, and on both sides of the middle of the body over a height of 100 mm. Heads, limbs and abdomens with
    the bases of the lungs do not, but neither does a chest of which little is seen, or whose lung has collapsed.
    """
    z_mm, y_mm, x_mm = volume.spacing_mm
    hu = preprocess.to_hu(torch.from_numpy(volume.voxels[slice(*volume.occupied)]))[:, None]
    if volume.axes[1] in "RL":
        hu = hu.transpose(2, 3)
    # Pixels of about 5 mm: noise and the rims of a body are no lung then.
    pixel = max(1, round(5 / x_mm))
    hu = F.avg_pool2d(hu, pixel)
    is_lung = (hu > -950) & (hu < -600)
    core_mm2 = (1 - F.max_pool2d(1 - is_lung.float(), 3, 1, 1)) * (y_mm * x_mm * pixel**2)
    # The middle of the body, not of the picture.
    soft = ((hu > -200) & (hu < 300)).sum((0, 1, 2))
    middle = int((soft * torch.arange(len(soft))).sum() / soft.sum().clamp(min=1))
    lung_ml = float(core_mm2.sum()) * z_mm / 1000
    # A side of a slice counts with 300 mm2 of lung.
    sides = (core_mm2[..., :middle], core_mm2[..., middle:])
    heights = [int((side.sum((1, 2, 3)) > 300).sum()) * z_mm for side in sides]
    if lung_ml >= _LEAST_ML and min(heights) >= _LEAST_MM:
        return ""
    return (
        f"this does not look like a chest CT: {lung_ml:.0f} ml of lung, over {heights[0]:.0f} and "
        f"{heights[1]:.0f} mm of height on the two sides, where a chest has {_LEAST_ML} ml over {_LEAST_MM} mm "
        "or more; what is said of its findings means little"
    )
