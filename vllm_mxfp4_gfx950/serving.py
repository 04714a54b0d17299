"""A model's layers between a framework's loader and its forward: the backend chosen, prepared and checked."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator

import torch

from vllm_mxfp4_gfx950 import backends, choice, self_check, settings
from vllm_mxfp4_gfx950.errors import Mxfp4Error, brief
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.self_check import PLAN_NAMES
from vllm_mxfp4_gfx950.tiles import Ladder, Plan

# Loggers below `vllm` print where vLLM's own do; in SGLang they are below the root, as its own are.
logger = logging.getLogger("vllm.mxfp4_triton")


class ModelLayers:
    """A model's layers. Their backend is chosen before they are loaded, and again if a layer comes out wrong.

    Args:
        shape: each layer on this rank.
        arch: as `backends.arch_of` names it.
        wanted: what the user asked for.
        largest: the most tokens of a batch.
        captured: as `choice.clock` takes it.

    Raises:
        Mxfp4Error: no backend can serve it.
    """

    def __init__(
        self,
        shape: MoeShape,
        arch: str,
        wanted: settings.Settings,
        largest: int,
        captured: int | None = None,
    ) -> None:
        self.shape, self.wanted, self.largest, self.captured = shape, wanted, largest, captured
        self.selection = backends.select(shape, arch, wanted)
        self.checked = ""  # The name of the first layer that was.
        self.plans: Ladder[Plan] | None = None
        self.choice: choice.Choice | None = None
        logger.info("MoE layers run through %s. Each is %s.", self.selection, shape)
        if wanted.self_check == "off":
            logger.info("Layers are not checked: %s=off.", settings.SELF_CHECK_VAR)

    def __str__(self) -> str:
        return f"{self.selection}{f'; by time, {self.choice}' if self.choice else ''}"

    def prepare(self, weights: MoeWeights, prefix: str) -> backends.Layer:
        """A layer for the backend that serves it, compared with float64 where the user wants that.

        The reference is what others are compared with, so it is not.

        Args:
            weights: consumed.
            prefix: the layer's name, for the log.

        Raises:
            Mxfp4Error: no backend computed the layer right, or there was too little memory.
        """
        before = self.selection
        with _memory_for(prefix):
            if not self._is_checked(prefix):
                layer = before.backend.prepare(weights, self.shape, self.wanted.tables)
                return self._arranged(layer) if self.checked else layer
            if self.wanted.backend == "fastest" and not self.checked:
                self.selection, layer = self._fastest(weights, prefix)
            else:
                self.selection, layer = self._checked(before, weights, prefix, self.wanted)
        self.checked = self.checked or prefix
        if isinstance(layer, backends.TiledLayer):
            self.plans = layer.plans
        if self.selection is not before:
            logger.warning("MoE layers run through %s.", self.selection)
        return layer

    def _checked(
        self, selection: backends.Selection, weights: MoeWeights, prefix: str, wanted: settings.Settings
    ) -> tuple[backends.Selection, backends.Layer]:
        """The first layer from a selection on that is right."""
        report = functools.partial(_report, prefix)
        return self_check.prepare(selection, weights, self.shape, wanted, report, self._arranged)

    def _fastest(self, weights: MoeWeights, prefix: str) -> tuple[backends.Selection, backends.Layer]:
        """The right layer that takes the least time, of all backends; where none runs, what "auto" takes."""
        cost = choice.clock(self.shape, weights.w13.device, self.captured)
        arch = self.selection.arch
        best: tuple[dict[int, float], choice.Choice | None] | None = None
        for family in backends.TIMED:
            wanted = dataclasses.replace(self.wanted, backend=family)
            self.choice = None
            try:
                selection = backends.select(self.shape, arch, wanted)
                selection, layer = self._checked(selection, weights, prefix, wanted)
            except Mxfp4Error as error:
                logger.info("Not timed: %s: %s", family, error)
                continue
            us = choice.times(layer, self.largest, cost)
            if math.inf in us.values():
                failed = ", ".join(str(tokens) for tokens in us if us[tokens] == math.inf)
                logger.info(
                    "Not timed: %s does not run batches of %s tokens.", selection.backend.NAME, failed
                )
                continue
            figures = ", ".join(f"{tokens}: {each:.1f}" for tokens, each in us.items())
            logger.info("Timed: %s takes (us by tokens) %s.", selection.backend.NAME, figures)
            if best is None or choice.TIE * choice.ratio(us, best[0]) < 1:
                best, served = (us, self.choice), (selection, layer)
        if best is None:
            return self._checked(self.selection, weights, prefix, self.wanted)
        self.choice = best[1]
        return served

    def _arranged(self, layer: backends.Layer) -> backends.Layer:
        """A layer with the plans that are the fastest on this GPU, timed once for all layers."""
        if not isinstance(layer, backends.TiledLayer):
            return layer
        if self.plans is not None:
            return layer.with_plans(self.plans)
        if not self.wanted.time_at_load or layer.pinned or not torch.cuda.is_available():
            return layer
        cost = choice.clock(self.shape, torch.device("cuda"), self.captured)
        self.choice = choice.choose(layer, self.largest, cost, self.captured)
        torch.cuda.empty_cache()
        logger.info("Chosen by time: %s.", self.choice)
        return layer.with_plans(self.choice.plans)

    def _is_checked(self, prefix: str) -> bool:
        """Whether a layer is compared with float64."""
        if self.selection.backend.NAME == "reference" or self.wanted.self_check == "off":
            return False
        return self.wanted.self_check == "all" or self.checked in ("", prefix)

    def refill(self, layer: backends.Layer, weights: MoeWeights, prefix: str) -> None:
        """Give a prepared layer other weights, in the memory that captured graphs read.

        It is compared with float64 again if it was before.

        Args:
            layer: as `prepare` has returned it; changed.
            weights: consumed.
            prefix: the layer's name, for the log.

        Raises:
            Mxfp4Error: its kernels cannot compute these weights, or compute them wrong, or there was too
                little memory.
        """
        checked = self._is_checked(prefix)
        fix = "Start the server anew: what it has captured runs through the kernels of the old weights"
        with _memory_for(prefix):
            given = weights.clone() if checked else weights
            fresh = self.selection.backend.prepare(given, self.shape, self.wanted.tables)
            if isinstance(layer, backends.TiledLayer) and isinstance(fresh, backends.TiledLayer):
                lost = sorted(PLAN_NAMES[plan] for plan in {*layer.plans.rungs} - {*fresh.offered(1)})
                if lost:
                    rule, found = "weights for the kernels of those before", f"none for {' and '.join(lost)}"
                    raise Mxfp4Error(prefix, rule, found, fix)
            backends.overwrite(layer, fresh)
            if checked:
                outcome = self_check.check(layer, weights, self.shape)
                _report(prefix, self.selection.backend.NAME, outcome)
                if outcome.miss:
                    raise Mxfp4Error(prefix, "computed right with its new weights", outcome.miss, fix)


@contextlib.contextmanager
def _memory_for(prefix: str) -> Iterator[None]:
    """Say what to do where there is too little memory for a layer."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        name, rule = "the GPU's free memory", f"enough to prepare {prefix}"
        fix = "Stop what else uses this GPU, or serve with a larger --tensor-parallel-size"
        raise Mxfp4Error(name, rule, brief(error).rstrip("."), fix) from error


def _report(prefix: str, name: str, outcome: self_check.Outcome) -> None:
    """Log what a check of a layer has found of a backend."""
    log = logger.warning if outcome.miss else logger.info
    log("Self-check of %s through %s: %s.", prefix, name, outcome)


@functools.cache
def model_layers(
    shape: MoeShape, arch: str, wanted: settings.Settings, largest: int, captured: int | None = None
) -> ModelLayers:
    """What all layers of a model share."""
    return ModelLayers(shape, arch, wanted, largest, captured)


def check_activation_dtype(dtype: torch.dtype, arch: str) -> None:
    """Raise Mxfp4Error unless the experts can take activations of this dtype on this arch."""
    allowed = (torch.bfloat16, torch.float32) if arch == "cpu" else (torch.bfloat16,)
    if dtype not in allowed:
        raise Mxfp4Error(
            "--dtype", f"{' or '.join(map(str, allowed))} on {arch}", dtype, "Serve with --dtype bfloat16"
        )


def refuse_state_dict(layer: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
    """Raise Mxfp4Error where a model is asked for its state, in which these experts would be missing.

    A hook of torch's, called by `state_dict`.
    """
    fix = "Keep the checkpoint that the model was loaded from: prepared experts cannot be saved"
    raise Mxfp4Error(f"{prefix}*", "left out of any saved state", "state_dict()", fix)
