"""What is on the device, what waits in host memory and what gives way, planned before anything is loaded or moved.

What is used should be on the device whole: the running denoiser, its text encoders and VAE, and what a run allocates.
Where that is too much, the text encoders are streamed from host memory, and then the denoiser too
(engine/weights/streaming.py). Whatever else is loaded stays there while there is room; beyond that the parts used
longest ago wait in pinned host memory, and those for which there is no room either are forgotten. The rules are the
same for every precision.

GB are 1e9 bytes. Plans only: engine/weights/host_memory.py moves weights, engine/runtime/residents.py owns them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import psutil
import torch

from engine.catalog import ModelSpec
from engine.environment import positive
from engine.errors import NoRoomError
from engine.request import CompareRequest
from engine.results import DENOISER, TEXT

GB = 1e9
RESERVE = 2.0
"""GB of a GPU that no plan gives away: libraries' workspaces, recorded graphs, metrics, fragmentation."""
HOST_RESERVE = 16.0
"""GB of host memory left to loading, to the libraries and to everybody else."""
LIMIT_VARIABLE = "TWINFRAME_GPU_MEMORY"

DEVICE, HOST, GONE = "device", "host", "gone"
"""Places: on the device, waiting in pinned host memory, and not loaded."""

Key = tuple[str, str, str]
"""Model id, precision and recipe of a denoiser; of what a model's denoisers share, see `shared_key`."""


def shared_key(model_id: str) -> Key:
    """The part with a model's text encoders, VAE and the like."""
    return (model_id, "", "")


# ---------------------------------------------------------------------------------------------------------------------
# What the machine has


@dataclass(frozen=True, kw_only=True)
class Room:
    """Memory of one device or of the host, in GB."""

    what: str
    """"GPU memory" or "host memory"."""
    free: float
    total: float


def rooms(device: torch.device) -> tuple[Room, Room]:
    """What `device` and the host have; the same twice for a CPU."""
    host = _host()
    if device.type == "cpu":
        return host, host
    free, total = torch.cuda.mem_get_info(device)
    # What PyTorch holds and others can use is as good as free.
    free += torch.cuda.memory_reserved(device) - held_bytes(device)
    return Room(what="GPU memory", free=free / GB, total=total / GB), host


def held_bytes(device: torch.device) -> int:
    """What of a CUDA device's memory nobody else can use: what is allocated, and the pools of CUDA graphs whole, as a
    replay writes where nothing is allocated any more."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    pools = [s for s in torch.cuda.memory_snapshot() if s["device"] == index and tuple(s["segment_pool_id"]) != (0, 0)]
    return torch.cuda.memory_allocated(device) + sum(s["total_size"] - s["allocated_size"] for s in pools)


def _host(group: Path = Path("/sys/fs/cgroup")) -> Room:
    """Host memory; in a container with a limit (cgroup v2) what the limit leaves, not what the machine has."""
    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        used = int((group / "memory.current").read_text())
        lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = next(int(value) for name, value in lines if name == "inactive_file")
    except (OSError, ValueError, StopIteration):
        return Room(what="host memory", free=free / GB, total=total / GB)
    return Room(what="host memory", free=min(free, limit - used + cached) / GB, total=min(total, limit) / GB)


def limit() -> float:
    """GB of GPU memory that weights and runs may fill, from $TWINFRAME_GPU_MEMORY; infinite without it.

    Raises:
        RequestError: it is not a positive number.
    """
    return positive(os.environ, LIMIT_VARIABLE, math.inf)


def capacity(device: torch.device, held: float, most: float = math.inf) -> float:
    """GB of weights and runs that the device can hold, of which `held` GB of weights are there already."""
    here, _ = rooms(device)
    if device.type == "cpu":
        return min(here.total, here.free + held)
    return min(most, here.free + held - RESERVE, here.total - RESERVE)


def waiting_room(device: torch.device, pooled: float) -> float:
    """GB of weights that can wait in host memory, `pooled` GB of which are taken for it already; none for a CPU, whose
    memory is the host's."""
    if device.type == "cpu":
        return 0.0
    return max(0.0, rooms(device)[1].free + pooled - HOST_RESERVE)


def run_memory(spec: ModelSpec, request: CompareRequest) -> float:
    """GB that a run of the request allocates beyond all weights, at most.

    The catalog's figure for the default settings, times how many more pictures, frames and pixels are asked for, and
    the text's keys and values. A smaller run counts as a default one. The post's peaks at batch 4 and 8 lie below this.
    """
    if spec.memory_gb is None:
        return 0.0
    default = spec.defaults
    usual = default.height * default.width * default.num_frames * default.batch_size
    asked = request.height * request.width * request.num_frames * request.batch_size
    return spec.memory_gb.run * max(1.0, asked / usual) + spec.memory_gb.text_kv


def usable(device: torch.device) -> float:
    """GB of the device that weights and runs may fill where nothing else is there."""
    here, _ = rooms(device)
    return here.total if device.type == "cpu" else min(limit(), here.total - RESERVE)


def streams_text(spec: ModelSpec, device: torch.device) -> bool:
    """Whether the text encoders are streamed, of all precisions alike, so that these can be compared: the device has no
    room for them beside the bf16 denoiser, and the host has."""
    memory = spec.memory_gb
    if memory is None or device.type == "cpu" or memory.weights + memory.one_run <= usable(device):
        return False
    return memory.shared - memory.kept <= rooms(device)[1].total - HOST_RESERVE


def require(spec: ModelSpec, precision: str, transformer: float, device: torch.device) -> tuple[str, ...]:
    """What has to be streamed where nothing else is loaded: nothing, `TEXT`, or `TEXT` and `DENOISER`.

    Args:
        transformer: GB of the denoiser in this precision, as its plan says.

    Raises:
        NoRoomError: even so it does not fit; in one sentence with the numbers.
    """
    memory = spec.memory_gb
    if memory is None:
        return ()
    here, host = rooms(device)
    if device.type != "cpu" and memory.host > host.total:
        raise NoRoomError(_refusal(spec, precision, memory.host, host, host.total))
    room, text = usable(device), streams_text(spec, device)
    need = transformer + (memory.kept if text else memory.shared) + memory.one_run
    if need <= room:
        return (TEXT,) if text else ()
    if not text:
        raise NoRoomError(_refusal(spec, precision, need, here, room))
    if (need := memory.footprint + memory.kept + memory.run) > room:
        raise NoRoomError(_refusal(spec, precision, need, here, room, streamed=True))
    if (waiting := memory.shared - memory.kept + transformer) > host.total - HOST_RESERVE:
        raise NoRoomError(_refusal(spec, precision, waiting, host, host.total - HOST_RESERVE, streamed=True))
    return (TEXT, DENOISER)


def refusal(
    spec: ModelSpec, precision: str, error: NoRoom, usable: float, waiting: float, device: torch.device, streamed: bool
) -> str:
    """Why there is no room at this moment, in one sentence with the numbers.

    Args:
        usable, waiting: GB that may be filled on the device and in host memory.
        streamed: the numbers are those of a run in which weights are streamed.
    """
    here, host = rooms(device)
    if error.place == HOST:
        return _refusal(spec, precision, error.need, host, waiting, streamed)
    return _refusal(spec, precision, error.need, here, usable, streamed)


def _refusal(spec: ModelSpec, precision: str, need: float, room: Room, usable: float, streamed: bool = False) -> str:
    how = ", streamed," if streamed else ""
    return (
        f"{spec.name} in {precision} needs{how} {need:.1f} GB of {room.what}, and this machine has {room.total:.1f} "
        f"GB, {max(0.0, usable):.1f} GB of them to use here: choose a smaller model or a larger machine."
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is where, and what should be


@dataclass(frozen=True, kw_only=True)
class Part:
    """Weights that are moved as one: a denoiser, or what a model's denoisers share."""

    key: Key
    gigabytes: float
    place: str
    """`DEVICE` or `HOST`."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """One step of a plan."""

    key: Key
    to: str
    """`DEVICE`, `HOST` or `GONE`."""


class NoRoom(Exception):
    """What is wanted does not fit even if everything else leaves.

    Attributes:
        need: GB that it takes.
        place: `DEVICE` or `HOST`, whose memory is too small.
    """

    def __init__(self, need: float, place: str = DEVICE):
        super().__init__(f"{need:.1f} GB are needed")
        self.need, self.place = need, place


class Shelf:
    """Which weights are where, in the order of their use. Plans moves, and is told when they are done.

    Args:
        grain: host memory is taken in multiples of so many GB.
    """

    def __init__(self, grain: float = 0.0):
        self._grain = grain
        self._parts: dict[Key, Part] = {}
        """The one used longest ago first."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """Everything that is loaded, the part used longest ago first."""
        return tuple(self._parts.values())

    def place(self, key: Key) -> str:
        """`DEVICE`, `HOST` or `GONE`."""
        return self._parts[key].place if key in self._parts else GONE

    def gigabytes(self, key: Key) -> float | None:
        """Of a part as it was loaded; None for one that is not."""
        return self._parts[key].gigabytes if key in self._parts else None

    def held(self, place: str) -> float:
        """GB of all parts in a place."""
        return sum(part.gigabytes for part in self._parts.values() if part.place == place)

    def put(self, key: Key, gigabytes: float, place: str = DEVICE) -> None:
        """A part was loaded."""
        self._parts.pop(key, None)
        self._parts[key] = Part(key=key, gigabytes=gigabytes, place=place)

    def use(self, *keys: Key) -> None:
        """Parts are used now, the last of them last; those that are not loaded are passed over."""
        for key in keys:
            if key in self._parts:
                self._parts[key] = self._parts.pop(key)

    def done(self, move: Move) -> None:
        """A move was carried out."""
        if move.to == GONE:
            self._parts.pop(move.key, None)
        else:
            self._parts[move.key] = replace(self._parts[move.key], place=move.to)

    def plan(
        self,
        wanted: Mapping[Key, float],
        run: float,
        device: float,
        host: float,
        streamed: Mapping[Key, float] = MappingProxyType({}),
    ) -> tuple[Move, ...]:
        """Moves after which everything wanted is on the device or has room to be loaded there.

        Carried out in order, they never fill either memory beyond its size. What was used most recently stays on the
        device if it can, else in host memory. A model's denoisers and what they share need each other: if one side
        goes, so does the other.

        Args:
            wanted: GB of each part that must be on the device; those not loaded yet will be loaded there.
            run: GB that must be free besides.
            device, host: GB that may be filled on the device and in host memory.
            streamed: GB of each part that is used from host memory, where it will be or has room to be loaded; what it
                takes of the device meanwhile is part of `run`.

        Raises:
            NoRoom: wanted and run alone are more than `device`, or what is streamed is more than `host`.
        """
        need = sum(wanted.values()) + run
        if need > device:
            raise NoRoom(need)
        others = [part for part in self._parts.values() if part.key not in wanted and part.key not in streamed]
        leaving = self._leaving([part for part in others if part.place == DEVICE], device - need)
        waiting = [key for key in wanted if self.place(key) == HOST]
        # The wanted stay in host memory until those that leave are there.
        taken = [self._parts[key].gigabytes for key in waiting] + list(streamed.values())
        free = host - sum(map(self._stored, taken))
        if streamed and free < 0:
            raise NoRoom(sum(streamed.values()), HOST)
        gone: set[Key] = set()
        for part in reversed(others):
            if part.place == DEVICE and part.key not in leaving:
                continue
            if shared_key(part.key[0]) not in gone and self._stored(part.gigabytes) <= free:
                free -= self._stored(part.gigabytes)
            else:
                gone.add(part.key)
        gone |= {part.key for part in others if self._useless(part, (*wanted, *streamed), gone)}
        # Parts that go because they are useless may leave room on the device for some that were to wait.
        there = [part for part in others if part.place == DEVICE and part.key not in gone]
        room = device - need - sum(part.gigabytes for part in there if part.key not in leaving)
        leaving -= _spared([part for part in there if part.key in leaving], room)
        return (
            *(Move(key=part.key, to=GONE) for part in others if part.key in gone),
            *(Move(key=key, to=HOST) for key in streamed if self.place(key) == DEVICE),
            *(Move(key=part.key, to=HOST) for part in others if part.key in leaving and part.key not in gone),
            *(Move(key=key, to=DEVICE) for key in waiting),
        )

    def _leaving(self, there: list[Part], room: float) -> set[Key]:
        """Of the parts on the device those that must leave it, so that together with `room` GB they fit."""
        room -= sum(part.gigabytes for part in there)
        chosen = []
        for part in there:  # used longest ago first
            if room >= 0:
                break
            chosen.append(part)
            room += part.gigabytes
        # A small one need not leave if a large one does.
        return {part.key for part in chosen} - _spared(chosen, room)

    def _useless(self, part: Part, wanted: Collection[Key], gone: set[Key]) -> bool:
        """Whether a part has lost what it needs to be used."""
        model, shared = part.key[0], shared_key(part.key[0])
        if part.key != shared:
            return shared in gone
        left = [key for key in (*self._parts, *wanted) if key[0] == model and key != shared and key not in gone]
        return not left

    def _stored(self, gigabytes: float) -> float:
        return math.ceil(gigabytes / self._grain) * self._grain if self._grain else gigabytes


def _spared(leaving: list[Part], room: float) -> set[Key]:
    """Which of these parts fit into `room` GB after all; those used last are tried first."""
    spared = set()
    for part in reversed(leaving):
        if part.gigabytes <= room:
            room -= part.gigabytes
            spared.add(part.key)
    return spared
