"""What sensors measure of a current inside the head: a helmet, its layout, and the field of a dipole in a sphere.

With MNE installed (``pip install 'isthmus[brain]'``) the helmet is the canonical CTF-275 with its coils, and MNE works
out the fields; without it, 274 radial gradiometers on a cap, and the formula of Sarvas (1987, Phys. Med. Biol. 32:11).
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any, Protocol

import torch
from torch import Tensor

from isthmus.codec import UserError

SENSORS = 274
"""Of a whole helmet."""
_BASELINE = 0.05  # metres between the coils of a gradiometer


class Helmet(Protocol):
    """Sensors around a head whose centre is the origin.

    Attributes:
        name: ``"ctf275"`` or ``"sphere"``.
        layout: ``(C, 2)`` in [0, 1], x from left to right, y from back to front.
    """

    name: str
    layout: Tensor

    def leadfield(self, position: Tensor, orientation: Tensor) -> Tensor:
        """Fields of unit dipoles at ``(J, 3)`` metres, in directions ``(J, 3)``: ``(C, J)`` tesla per ampere metre."""
        ...


def helmet(geometry: str, sensors: int = SENSORS) -> Helmet:
    """``"ctf275"`` (needs MNE), ``"sphere"``, or ``"auto"``: the first where MNE is installed.

    Args:
        geometry: which.
        sensors: how many of its 274, at equal distances in their order.

    Raises:
        UserError: an unknown geometry, or more sensors than there are.
    """
    if geometry == "auto":
        geometry = "ctf275" if importlib.util.find_spec("mne") is not None else "sphere"
    if geometry not in ("ctf275", "sphere"):
        raise UserError(f"geometry is auto, ctf275 or sphere, not {geometry!r}.")
    if not 1 <= sensors <= SENSORS:
        raise UserError(f"the helmet has 1 to {SENSORS} sensors, got {sensors}.")
    chosen = torch.arange(sensors) * SENSORS // sensors
    return _MNEHelmet(chosen) if geometry == "ctf275" else SphereHelmet(chosen)


class SphereHelmet:
    """Radial gradiometers on a cap of 12 cm radius, down to 110 degrees from the vertex, in a golden spiral."""

    name = "sphere"

    def __init__(self, chosen: Tensor) -> None:
        height = torch.linspace(1.0, math.cos(math.radians(110)), SENSORS, dtype=torch.float64)
        turn = torch.arange(SENSORS, dtype=torch.float64) * math.pi * (3 - 5**0.5)
        flat = (1 - height.square()).clamp_min(0).sqrt()
        self.normal = torch.stack([flat * turn.cos(), flat * turn.sin(), height], 1)[chosen]
        angle = height.clamp(-1, 1).acos()[chosen]
        flattened = torch.stack([angle * turn[chosen].cos(), angle * turn[chosen].sin()], 1)
        self.layout = unit_square(flattened)

    def leadfield(self, position: Tensor, orientation: Tensor) -> Tensor:
        coil = 0.12 * self.normal
        fields = [
            dipole_field(coil + away * self.normal, position.double(), orientation.double())
            for away in (0.0, _BASELINE)
        ]
        return torch.einsum("cjx,cx->cj", fields[0] - fields[1], self.normal).float()


def dipole_field(sensor: Tensor, position: Tensor, moment: Tensor) -> Tensor:
    """Magnetic field of current dipoles in a conducting sphere about the origin (Sarvas 1987, eq. 25).

    Args:
        sensor: ``(C, 3)`` metres, outside of the sphere.
        position: ``(J, 3)``, inside.
        moment: ``(J, 3)`` ampere metres.

    Returns:
        ``(C, J, 3)`` tesla. Radial dipoles, and dipoles at the centre, have no field.
    """
    r, r0 = sensor[:, None], position[None]
    a = r - r0
    a_len, r_len = a.norm(dim=-1, keepdim=True), r.norm(dim=-1, keepdim=True)
    along = (a * r).sum(-1, keepdim=True)
    f = a_len * (r_len * a_len + r_len.square() - (r0 * r).sum(-1, keepdim=True))
    gradient = (a_len.square() / r_len + along / a_len + 2 * a_len + 2 * r_len) * r - (
        a_len + 2 * r_len + along / a_len
    ) * r0
    cross = torch.linalg.cross(moment, position)[None]
    return 1e-7 / f.square() * (f * cross - (cross * r).sum(-1, keepdim=True) * gradient)


class _MNEHelmet:
    """The canonical CTF-275: coil geometry, layout and forward model of MNE."""

    name = "ctf275"

    def __init__(self, chosen: Tensor) -> None:
        import mne

        info = mne.channels.read_meg_canonical_info("ctf275", verbose="ERROR")
        self.info = mne.pick_info(info, chosen.tolist(), verbose="ERROR")
        layout = mne.channels.find_layout(info, ch_type="mag")
        places = dict(zip(layout.names, layout.pos[:, :2].tolist(), strict=True))
        names = [info["ch_names"][i].partition("-")[0] for i in chosen.tolist()]
        self.layout = unit_square(torch.tensor([places[name] for name in names]))
        # The head sits where the coils' own sphere has its centre.
        points = torch.tensor([channel["loc"][:3].tolist() for channel in info["chs"]], dtype=torch.float64)
        system = torch.cat([2 * points, torch.ones(len(points), 1, dtype=torch.float64)], 1)
        self.centre = torch.linalg.lstsq(system, points.square().sum(1, keepdim=True)).solution[:3, 0]

    def leadfield(self, position: Tensor, orientation: Tensor) -> Tensor:
        import mne

        whole: Any = mne  # its stubs take neither sources by place nor a sphere without layers
        places = (position.double() + self.centre).numpy()
        pos = {"rr": places, "nn": orientation.double().numpy()}
        fwd = mne.make_forward_solution(
            self.info,
            trans=mne.transforms.Transform("head", "mri"),
            src=whole.setup_volume_source_space(pos=pos, verbose="ERROR"),
            bem=whole.make_sphere_model(r0=tuple(self.centre.tolist()), head_radius=None, verbose="ERROR"),
            meg=True,
            eeg=False,
            verbose="ERROR",
        )
        gain = torch.as_tensor(fwd["sol"]["data"]).view(len(self.layout), -1, 3)
        return torch.einsum("cjx,jx->cj", gain, orientation.double()).float()


def unit_square(layout: Tensor) -> Tensor:
    """Places ``(C, 2)`` stretched to [0, 1] along both axes; a single sensor stands in the middle."""
    low, high = layout.amin(0), layout.amax(0)
    return torch.where(high > low, (layout - low) / (high - low).clamp_min(1e-12), torch.full_like(layout, 0.5)).float()
