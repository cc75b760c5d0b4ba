"""``--strategy fsdp``: every process keeps a share of weights, gradients and optimiser state (torch's ``fully_shard``).

Weights are gathered once a step, for the objective as a whole, so that objectives may call their parts in any way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lightning_fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_STATE_HOOKS = ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks")


def strategy() -> ModelParallelStrategy:
    """Fabric's strategy that shards over all processes."""
    return ModelParallelStrategy(_shard)


def is_lost(error: BaseException | None) -> bool:
    """Whether a collective failed because another process is gone, as gloo, NCCL and the store tell it."""
    if isinstance(error, torch.distributed.DistError):
        return True
    signs = ("connection closed by peer", "connection reset by peer", "gloo", "nccl", "broken pipe")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    fully_shard(module, mesh=init_device_mesh(mesh.device_type, (torch.distributed.get_world_size(),)))
    return module


class Shell(nn.Module):
    """A module around an objective for the sharding to happen to; the objective's own class and hooks stay as they are.

    Args:
        objective: what is trained.
    """

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective
        # Sharding hangs hooks on every part that would shard it again whenever a state is taken; see dissolve.
        self._hooks = [(m, {name: dict(m.__dict__[name]) for name in _STATE_HOOKS}) for m in objective.modules()]

    def forward(self, *arguments: Any) -> Any:
        return self.objective(*arguments)

    @contextlib.contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The objective with whole weights, to evaluate or to copy; all processes enter together."""
        assert isinstance(self, FSDPModule)
        self.unshard()
        try:
            yield self.objective
        finally:
            self.reshard()

    def model_state(self) -> dict[str, Any]:
        """The objective's whole state; all processes call this together."""
        state = self.objective.state_dict()
        return {name: (v.full_tensor() if isinstance(v, DTensor) else v).cpu() for name, v in state.items()}

    def load_model_state(self, state: dict[str, Any]) -> None:
        """Take this process's share of a whole state.

        Raises:
            KeyError, RuntimeError: the state is another objective's.
        """
        own = self.objective.state_dict()
        if own.keys() != state.keys():
            raise KeyError(f"names differ: {', '.join(sorted(own.keys() ^ state.keys())[:3])}")
        with torch.no_grad():
            for name, tensor in own.items():
                _local(tensor).copy_(_local(_share(state[name], tensor)))

    @staticmethod
    def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """An optimiser's state as one process alone would have it; all processes call this together."""
        state = optimizer.state_dict()
        whole = {
            number: {key: v.full_tensor() if isinstance(v, DTensor) else v for key, v in values.items()}
            for number, values in state["state"].items()
        }
        return {**state, "state": whole}

    @staticmethod
    def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Take this process's share of an optimiser's whole state."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        shares = {
            number: {key: _share(v, parameters[number]) for key, v in values.items()}
            for number, values in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": shares})

    def dissolve(self) -> None:
        """Leave the objective with plain, whole parameters, as before."""
        with self.whole() as objective:
            whole = {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in objective.parameters()}
            owned = [
                (m, n, whole[id(p)]) for m in objective.modules() for n, p in m._parameters.items() if p is not None
            ]
        for module, name, parameter in owned:
            module._parameters[name] = parameter
        for module, hooks in self._hooks:
            for name, before in hooks.items():
                table = module.__dict__[name]
                for key in table.keys() - before.keys():
                    del table[key]


def _share(value: Any, like: Tensor) -> Any:
    """What this process keeps of a whole tensor that is laid out as a sharded one of its shape; no communication."""
    if not isinstance(value, Tensor) or not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
