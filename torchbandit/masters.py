"""Float32 masters for what an optimizer steps in 16 bits."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class MasterOptimizer:
    """A torch optimizer whose 16-bit parameters have float32 masters; float32 ones are their own.

    At lr 1e-5 most updates of a bf16 weight round to nothing (trap 17): the master keeps them, the weight is its
    rounding. Gradients are added up in the parameter's own dtype by autograd and cast once a step.

    Args:
        params: parameters, or parameter groups as torch optimizers take them.
        optimizer: the class, AdamW by default.
        options: passed on (lr, betas, weight_decay, ...).
    Source: Micikevicius et al. 2018 (Mixed Precision Training), section 3.1.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
        **options: Any,
    ) -> None:
        groups = [g if isinstance(g, dict) else {"params": [g]} for g in params]
        if groups and all(len(g) == 1 and len(g["params"]) == 1 for g in groups):
            groups = [{"params": [p for g in groups for p in g["params"]]}]
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        masters: list[dict[str, Any]] = []
        for group in groups:
            kept = [p for p in group["params"] if p.requires_grad]
            pairs = [(p, p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())) for p in kept]
            self._pairs += pairs
            masters.append({**group, "params": [master for _, master in pairs]})
            half = next((p for p in kept if p.dtype == torch.float16), None)
            if half is not None:
                raise ValueError(
                    "params: float16 gradients underflow without loss scaling (trained so, they are 14% off); load the "
                    'model with dtype="bfloat16" or "float32", got float16'
                )
        if not self._pairs:
            raise ValueError("params: must hold at least one parameter that requires gradient, got none")
        self._own = [(p, m) for p, m in self._pairs if m is not p]
        self._fused = "fused" in inspect.signature(optimizer.__init__).parameters and options.get("fused", True)
        if self._fused:
            options["fused"] = True
        self.optimizer = optimizer(masters, **options)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, over masters; set `lr` here."""
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        """Drop the gradients of parameters and masters."""
        for param, master in self._pairs:
            param.grad = None
            master.grad = None

    @torch.no_grad()
    def step(self, grad_clip: float | None = None, *, skip: Tensor | None = None) -> Tensor:
        """Step the masters and round them into the parameters.

        Args:
            grad_clip: largest L2 norm of all gradients together; None or 0 does not clip.
            skip: scalar bool on the device: where True nothing moves, as where the norm is not finite.
        Returns:
            the norm before clipping, float32 scalar on the device, no sync. Where it is not finite nothing moves:
            neither weights nor the optimizer's moments. (An optimizer without a fused step sees zero gradients then.)
        """
        for param, master in self._own:
            master.grad = None if param.grad is None else param.grad.float()
        live = [m for _, m in self._pairs if m.grad is not None]
        if not live:
            return torch.zeros((), device=self._pairs[0][1].device)
        grads = [m.grad for m in live if m.grad is not None]
        norms = [n.to(grads[0].device) for n in torch._foreach_norm(grads)]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        finite = norm.isfinite() if skip is None else norm.isfinite() & ~skip
        if grad_clip is not None and grad_clip > 0:
            scale = (grad_clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, torch.where(finite, scale, torch.ones_like(scale)))
        if self._fused:
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        else:
            for grad in grads:
                grad.copy_(torch.where(finite, grad, torch.zeros_like(grad)))
        self.optimizer.step()
        if self._own:
            torch._foreach_copy_([p for p, _ in self._own], [m for _, m in self._own])
        for _, master in self._own:
            master.grad = None
        return norm

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the weights as they are now for the masters, after something else than `step` has set them."""
        if self._own:
            torch._foreach_copy_([m for _, m in self._own], [p for p, _ in self._own])

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and the masters, which hold more than the rounded weights do."""
        return {"optimizer": self.optimizer.state_dict(), "masters": [m.detach() for _, m in self._own]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up `state_dict()` of an optimizer over the same parameters; weights become the masters' rounding.

        Raises:
            ValueError: another number or other shapes of masters.
        """
        masters = state["masters"]
        if [list(m.shape) for m in masters] != [list(m.shape) for _, m in self._own]:
            raise ValueError(
                f"optimizer state: must hold {len(self._own)} float32 masters of this model's shapes, got "
                f"{len(masters)}; resume with the model and dtype that wrote it"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        for (param, master), saved in zip(self._own, masters, strict=True):
            master.copy_(saved)
            param.copy_(master)
