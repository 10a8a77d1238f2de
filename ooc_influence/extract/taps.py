"""Tapping a model: hooks on its layers report inputs and output gradients; afterwards the model is as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ooc_influence.errors import InputError, UnsupportedModelError
from ooc_influence.extract.check import (
    Disagreement,
    GradientCheck,
    LayersDisagreeError,
    Receiver,
    differentiate_samples,
    explained,
    random_state,
)
from ooc_influence.extract.data import batch_size
from ooc_influence.extract.entries import Call, float_leaves
from ooc_influence.extract.entries.embedding import EmbeddingEntries
from ooc_influence.extract.layers import Use, find_uses
from ooc_influence.extract.losses import run_loss
from ooc_influence.extract.selection import Trained
from ooc_influence.extract.separation import Probe, RawReceiver, Separation, UnseparatedError
from ooc_influence.process import FUSED_ATTENTION
from ooc_influence.store import LayerShape, Mask

PerSampleLoss = Callable[[Any, Any], Tensor]
_TRIES = 4  # of a batch: each of them learns where some layers' samples are


def out_of_memory(error: Exception) -> bool:
    """Return whether an error is a lack of memory of the device, or of PyTorch's CPU allocator."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class _Tap(torch.autograd.Function):
    """Identity on a layer's output; its backward reports the layer's input and its output's gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, taps: Taps, number: int) -> Tensor:
        ctx.save_for_backward(x)  # not an attribute: autograd then notices if the model changes x in place
        ctx.taps, ctx.number = taps, number
        ctx.set_materialize_grads(False)
        return output.detach()  # no copy, and not a view to autograd: models may change it in place

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (delta,) = grads
        if delta is not None:
            (x,) = ctx.saved_tensors
            ctx.taps.receive(ctx.number, x, delta)
        return (delta if ctx.needs_input_grad[0] else None), None, None, None, None


class _CallTap(torch.autograd.Function):
    """The same for a layer that is run again: any arguments, any number of outputs."""

    @staticmethod
    def forward(ctx: Any, call: Call, anchor: Tensor, taps: Taps, number: int, *outputs: Tensor) -> Any:
        ctx.save_for_backward(*call.tensors())  # autograd notices if the model changes one in place
        ctx.call, ctx.taps, ctx.number = call, taps, number
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *deltas: Any) -> Any:
        if any(delta is not None for delta in deltas):
            assert len(ctx.saved_tensors) == len(ctx.call.tensors())  # unpacking compares their versions
            ctx.taps.receive(ctx.number, ctx.call, list(deltas))
        return (None, None, None, None, *deltas)


class Taps:
    """A tapped model; made by :func:`tapped`.

    Attributes
    ----------
    silent : set of str
        Tapped layers that have not received a gradient so far.
    check : GradientCheck or None
        Compares gathered entries with autograd, on the first batch and on those that fold samples in a new way.
    """

    def __init__(
        self, model: nn.Module, uses: Sequence[Use], device: torch.device, *, skip: Container[int] = (),
        check: GradientCheck | None = None, probe: bool = False, paused: bool = False,
    ) -> None:  # fmt: skip
        self._model, self._uses, self._skip = model, uses, skip
        self.check, self._probe_pending = check, probe
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._receiver: RawReceiver | None = None
        self._paused = paused  # while a receiver runs a layer again, autograd is asked, or no pass is to be received
        self._size = 0  # samples of the batch
        self._embeds = any(use.kind is EmbeddingEntries for use in uses)
        self._tapped = {use.shape.name for use in uses if use.layer not in skip}
        self.silent = set(self._tapped)
        self._separation = Separation(model, uses)
        self._checked: set[Any] = set()  # ways of folding that were compared with autograd
        self._several = False  # whether a batch of several samples was
        self._pending = check is not None  # until the first batch agrees
        self._unrecorded = True  # whether verification() has something new

    @property
    def all_silent(self) -> bool:
        """Whether no tapped layer has received a gradient so far."""
        return self.silent == self._tapped

    @property
    def model(self) -> nn.Module:
        """The model that is tapped."""
        return self._model

    def hook(self, number: int, use: Use) -> Callable[..., Any]:
        """Return the forward hook of a tapped module."""

        def forward_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._paused or not torch.is_grad_enabled() or (use.layer in self._skip and not self._pending):
                return output
            if use.kind.whole_call:
                return self._tap_call(number, args, kwargs, output)
            x = args[0] if args else next(iter(kwargs.values()))
            if use.kind is EmbeddingEntries:
                x, output = self._separation.spread(number, x, output, self._size)
            self._separation.shapes.append((number, tuple(x.shape)))
            return _Tap.apply(output, x, self._anchor, self, number)

        return forward_hook

    @contextmanager
    def hooked(self, *, all_layers: bool = False, as_python: bool = False) -> Iterator[None]:
        """Have the model's modules call the hooks meanwhile; of layers that are skipped, too, if ``all_layers``.

        With ``as_python``, torch.compile does not compile hooks, but calls them between the graphs before and after.
        """
        with ExitStack() as undo:
            for number, use in enumerate(self._uses):
                if all_layers or use.layer not in self._skip:
                    hook = self.hook(number, use)
                    hook = torch.compiler.disable(hook) if as_python else hook
                    undo.callback(use.module.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
            yield

    def _tap_call(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        leaves, spec = pytree.tree_flatten(output)
        floats = float_leaves(output)
        tapped = iter(_CallTap.apply(Call.of(args, kwargs, floats), self._anchor, self, number, *floats))
        return pytree.tree_unflatten([next(tapped) if any(v is f for f in floats) else v for v in leaves], spec)

    def receive(self, number: int, x: Any, delta: Any) -> None:
        """Receive a use's input and output gradient; calls add up."""
        if self._receiver is None:
            raise UnsupportedModelError(
                "expected a loss without gradients inside it, and in training a backward pass inside its step; "
                "received another backward pass: gradients of losses that differentiate the model need second "
                "derivatives"
            )
        with self._pausing(), torch.no_grad():
            self._receiver(number, x, delta)

    def _arranged(self, receiver: Receiver) -> RawReceiver:
        """Return what passes a use's raw x and δ, with samples on axis 0, on to a receiver."""

        def receive(number: int, x: Any, delta: Any) -> None:
            use = self._uses[number]
            try:
                receiver(use, *self._separation.arrange(number, x, delta, self._size))
            except IndexError as error:
                raise UnsupportedModelError(
                    f"expected layer {use.name!r} to compute what a layer of kind {use.kind.kind} does; received "
                    f"{type(error).__name__}: {error}: leave it out with modules= (--modules '!{use.name}')"
                ) from error
            self.silent.discard(use.shape.name)

        return receive

    def losses(self, per_sample_loss: PerSampleLoss, batch: Any) -> Tensor:
        """Return the losses (b,) of a batch on the device, without gradients."""
        with torch.inference_mode(False), torch.no_grad():
            return _checked_losses(per_sample_loss, self._model, batch)

    def run(
        self, per_sample_loss: PerSampleLoss, batch: Any, receiver: Callable[[int], Receiver],
        rows: Callable[[], Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Run a batch forwards and backwards and return its losses (b,).

        Parameters
        ----------
        per_sample_loss : callable (model, batch) -> (b,)
            The loss.
        batch : any
            On the device.
        receiver : callable b -> callable (use, x, δ)
            Makes the receiver of every layer's input and output gradient; called again if a batch is tried again.
        rows : callable -> (b, k) tensor, optional
            Returns the gathered kept entries, which are then compared with autograd too.

        Raises
        ------
        InputError
            If the loss is not a (b,) tensor that depends on a tapped layer.
        UnsupportedModelError
            If samples mix, a layer's samples cannot be told apart, or the loss differentiates the model.
        LayersDisagreeError
            If a layer's gathered entries are not autograd's gradients.
        """
        with torch.inference_mode(False), torch.enable_grad():
            for number in range(_TRIES):
                state = random_state(self._anchor.device) if self.check is not None else None
                losses = self._forward(per_sample_loss, batch)
                if self._try(losses, per_sample_loss, batch, receiver, rows, state, alone=number == 0):
                    return losses.detach()
        raise UnsupportedModelError(
            "expected layers whose samples can be told apart; received some that differ each time: use batches of one "
            "sample, or leave layers out with modules= (--modules)"
        )

    def _forward(self, per_sample_loss: PerSampleLoss, batch: Any) -> Tensor:
        """Run a batch forwards, and once more if its size differs from that of the batch's tensors."""
        size = batch_size(batch)
        if size is None and self._embeds:
            size = len(self.losses(per_sample_loss, batch))
        self._size = size or 0
        for _ in range(2):
            self._separation.begin()
            try:
                losses = _checked_losses(per_sample_loss, self._model, batch)
            except Exception as error:  # of the user's code, which may expect a single copy of positions
                if out_of_memory(error) or not self._separation.give_up_spreading():
                    raise
                self._separation.begin()
                losses = _checked_losses(per_sample_loss, self._model, batch)
            wrong = self._embeds and len(losses) != self._size
            self._size = len(losses)
            if not wrong:
                break
        if not losses.requires_grad:
            raise InputError(
                "expected the loss to depend on a tapped layer; received one that does not: it was detached, "
                "computed under no_grad, or the selected layers are not used"
            )
        return losses

    def _try(
        self, losses: Tensor, per_sample_loss: PerSampleLoss, batch: Any, receiver: Callable[[int], Receiver],
        rows: Callable[[], Tensor] | None, state: Any, *, alone: bool,
    ) -> bool:  # fmt: skip
        """Run a batch backwards; return whether the gathered entries can be kept.

        ``alone``: compare with samples run by themselves, which is cheap, but rounds differently from their batch.
        """
        b = len(losses)
        if self._probe_pending and self.check is None and b > 1:
            self._probe(losses)
            self._probe_pending = False
            self.silent = set(self._tapped)
        folds = self._separation.folds(batch, b)
        if self.check is None or not (self._pending or (b > 1 and not self._several) or folds - self._checked):
            self._backward(losses.sum(), self._arranged(receiver(b)))
            return True
        with self._pausing(), _without_caches(self._model):
            same = differentiate_samples(
                self.check, lambda part: _checked_losses(per_sample_loss, self._model, part), batch, losses, state,
                alone=alone, layers=self._to_check(b, folds),
            )  # fmt: skip
        if not same and self._separation.give_up_spreading():
            return False
        compared, gathered = self.check.gather_into(b)
        main = receiver(b)

        def both(use: Use, x: Any, delta: Any) -> None:
            main(use, x, delta)
            compared(use, x, delta)

        self._separation.unseparated.clear()
        failed: list[Disagreement] = []
        self._backward(losses.sum(), self._noting_failures(self._arranged(both), failed), keep_graph=True)
        disagree = self.check.compare(gathered(), None if rows is None else rows()) + failed
        if disagree or self._separation.unseparated:
            return not alone and self._settle(losses, disagree)
        self._pending = not self.check.errors and self.check.verifiable  # still, if no sample was finite
        self._several, self._unrecorded = self._several or b > 1, True
        self._checked |= folds
        return True

    def _noting_failures(self, receive: RawReceiver, failed: list[Disagreement]) -> RawReceiver:
        """Return a receiver that notes a layer's failure instead of raising it."""

        def noting(number: int, x: Any, delta: Any) -> None:
            try:
                receive(number, x, delta)
            except UnseparatedError as error:
                self._separation.unseparated[number] = error
            except (UnsupportedModelError, RuntimeError, ValueError, TypeError, IndexError) as error:
                if out_of_memory(error):
                    raise
                use, detail = self._uses[number], f"{type(error).__name__}: {error}"
                failed.append(Disagreement(use.name, type(use.module).__name__, float("inf"), None, detail))

        return noting

    def _to_check(self, b: int, folds: set[Any]) -> set[int] | None:
        """Return the layers to compare with autograd: all at first, then those that fold in a new way."""
        if self._pending:
            return None
        if b > 1 and not self._several:
            return {use.layer for use in self._uses if use.layer not in self._skip}
        return {self._uses[number].layer for number, *_ in folds - self._checked}

    def _settle(self, losses: Tensor, disagree: list[Disagreement]) -> bool:
        """Find out why layers disagree with autograd: return False to try again, or raise."""
        unseparated = self._separation.unseparated
        if len(unseparated) == len(self._uses):  # no layer has as many samples as the loss
            raise next(iter(unseparated.values()))
        if len(losses) > 1 and self._probe(losses):
            return False
        left_out = self._separation.left_out()
        names = {each.name for each in left_out}
        raise LayersDisagreeError.of([*left_out, *(each for each in disagree if each.name not in names)])

    @contextmanager
    def _pausing(self) -> Iterator[None]:
        """Run the model without taps, also where its backward pass recomputes gradient checkpoints."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @contextmanager
    def receiving(self, b: int, receiver: Receiver) -> Iterator[None]:
        """Receive a forward and backward pass of the caller's, over a batch of b samples."""
        self._size, self._paused = b, False
        self._separation.begin()
        self._receiver = self._arranged(receiver)
        try:
            yield
        finally:
            self._receiver, self._paused = None, True

    def probe(self, losses: Tensor) -> None:
        """Find out whether the samples of a pass that is being received mix; refuse them if they do."""
        with self._within():
            self._probe(losses)

    def differentiate(self, value: Tensor, receiver: Receiver) -> None:
        """Receive a backward pass of a value inside a pass that is being received, whose graph is kept for that."""
        with self._within():
            self._backward(value, self._arranged(receiver), keep_graph=True)

    @contextmanager
    def _within(self) -> Iterator[None]:
        """Receive other backward passes meanwhile, then the one that was being received."""
        receiver = self._receiver
        try:
            yield
        finally:
            self._receiver = receiver

    def _probe(self, losses: Tensor) -> bool:
        """Differentiate single samples' losses to find the samples; return whether that found anything new."""
        probe = Probe(self._separation, len(losses))
        for sample in (0, len(losses) - 1):  # both ends: some models mix in one direction only
            self._backward(losses[sample], probe.receiver(sample), keep_graph=True)
        return probe.conclude()

    def _backward(self, value: Tensor, receiver: RawReceiver, *, keep_graph: bool = False) -> None:
        self._receiver = receiver
        try:
            with explained():
                torch.autograd.grad(value, self._anchor, retain_graph=keep_graph, allow_unused=True)
        finally:
            self._receiver = None

    def verification(self) -> dict[str, Any] | None:
        """Return what a store records of the check, once after each; None if there is nothing new."""
        if not self._unrecorded or self._pending:
            return None
        self._unrecorded = False
        return {"checked": False} if self.check is None else self.check.facts()


@contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Have modules drop, before and after, what they compute once in evaluation mode and cache (LeViT's biases).

    Autograd would not reach the parameters through it. They drop it when they are put in training mode.
    """
    caching = [module for module in model.modules() if type(module).train is not nn.Module.train]

    def drop_caches() -> None:
        for module in caching:
            modes = [(each, each.training) for each in module.modules()]
            module.train()
            module.eval()
            for each, mode in modes:
                each.training = mode

    drop_caches()
    try:
        yield
    finally:
        drop_caches()


def _checked_losses(per_sample_loss: PerSampleLoss, model: nn.Module, batch: Any) -> Tensor:
    losses = run_loss(per_sample_loss, model, batch)
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.is_floating_point():
        received = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise InputError(
            f"expected per_sample_loss to return a float tensor of shape (b,); received {received}: return one loss a "
            "sample (reduction='none'), not their mean"
        )
    return losses


@contextmanager
def tapped(
    model: nn.Module,
    layers: Sequence[LayerShape],
    device: torch.device,
    *,
    skip: Container[int] = (),
    probe: bool = False,
    check: bool = False,
    mask: Mask | None = None,
) -> Iterator[Taps]:
    """Tap layers of a model, in evaluation mode; afterwards it is as it was, also after an error.

    Hooks, ``requires_grad`` flags, training modes, the device and torch's fused attention switch are restored;
    ``.grad`` is never touched. A compiled model runs uncompiled meanwhile: compiled code would not call the hooks.

    Parameters
    ----------
    model, layers, device
        The model, the layers to tap, and where to run.
    skip : container of int
        Numbers of layers to leave alone, because none of their entries is kept.
    probe : bool
        Check on the first batch of several samples that they do not influence each other; ``check`` includes that.
    check : bool
        Compare gathered entries, and the kept ones of ``mask``, with autograd (:mod:`.check`).
    """
    parameters = parameter_sequence(model)
    if any(parameter.is_inference() for parameter in parameters):
        raise UnsupportedModelError(
            "expected a model made outside torch.inference_mode; received one made inside: load it outside"
        )
    uses = find_uses(model, layers)
    home = parameters[0].device
    checking = GradientCheck(uses, device, Trained.of(model), mask) if check else None
    with ExitStack() as undo:
        undo.enter_context(FUSED_ATTENTION.held(False))  # the fused encoder layer does not call its linear layers
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        if home != device:
            undo.callback(model.to, home)
            model.to(device)
        for context in _wrapper_contexts(model):
            undo.enter_context(context)
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.RNNBase):  # cuDNN differentiates them in training mode only
                undo.callback(setattr, module, "dropout", module.dropout)
                module.dropout, module.training = 0.0, True
        for parameter in parameters:
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        taps = Taps(model, uses, device, skip=skip, check=checking, probe=probe)
        undo.enter_context(taps.hooked(all_layers=check))
        yield taps


@contextmanager
def tapped_in_training(
    model: nn.Module, uses: Sequence[Use], device: torch.device, skip: Container[int] = ()
) -> Iterator[Taps]:  # fmt: skip
    """Tap layers of a model that trains: it is left as it is, and passes are received where that is asked for.

    What torch.compile has compiled calls no hooks that came later, so it is compiled again, and once more afterwards.
    """
    taps = Taps(model, uses, device, skip=skip, paused=True)
    compiles = "torch._dynamo" in sys.modules  # otherwise nothing has been compiled
    with ExitStack() as undo:
        if compiles:
            torch.compiler.reset()
            undo.callback(torch.compiler.reset)
        undo.enter_context(taps.hooked(as_python=compiles))
        yield taps


def _wrapper_contexts(model: nn.Module) -> Iterable[AbstractContextManager[Any]]:
    """Yield contexts in which compiled models run uncompiled and DDP does not wait for gradients."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UnsupportedModelError(
            "expected a model sharded with torch.distributed.fsdp.fully_shard; received FullyShardedDataParallel, "
            "which frees its weights in a backward pass without weight gradients: wrap it with fully_shard"
        )
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        set_stance = getattr(torch.compiler, "set_stance", None)
        if set_stance is None:
            raise UnsupportedModelError(
                "expected PyTorch >= 2.6 to tap a compiled model; received an older one: pass the model from before "
                "torch.compile"
            )
        yield set_stance("force_eager")
    yield model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()


def parameter_sequence(model: nn.Module) -> Sequence[nn.Parameter]:
    """Return the model's parameters, at least one."""
    parameters = list(model.parameters())
    if not parameters:
        raise UnsupportedModelError(
            "expected a model with parameters; received one without: there is nothing to attribute"
        )
    return parameters
