"""Every text decoder of transformers that can be built small: equal to eager, or refused with the reason."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers as tf

import qaxis

from ..harness.claim import Context, Result, value
from ..inputs.architectures import Architecture, NotBuiltError, architectures, build, inputs, pictures, text_name

#: relative difference of logits up to which two orders of summation may lead
CLOSE = 1e-4
#: keys of the small budget
FEW = 4
#: tokens before decoding step by step
PREFIX = 44
#: modules whose layers carry a state instead of keys
RECURRENT = re.compile(r"Mamba|Mixer|DeltaNet|(Linear\w*|Lightning)Attention|ShortConv|RecurrentBlock|Rglru|KDA|SSM")
#: (model type, kind) of a quick run: a few of each kind, refused ones too
QUICK = (
    *((name, "causal") for name in (
        "llama", "gemma2", "gpt_oss", "gpt2", "bloom", "cohere", "deepseek_v3", "deepseek_v32", "qwen3_next", "zamba2",
        "inkling_text",
    )),
    *((name, "sequence-to-sequence") for name in ("t5", "bart", "pegasus_x")),
    ("whisper", "speech"), ("voxtral", "speech"),
    *((name, "vision-language") for name in ("llava", "paligemma", "qwen2_vl")),
)  # fmt: skip


@dataclass
class Row:
    """What was found of one architecture."""

    model_type: str
    name: str
    kind: str
    #: equal, refused, wrong, crashed, not built
    outcome: str = "equal"
    reason: str = ""
    #: relative, of logits, from eager attention with every key kept
    difference: float | None = None
    decode: float | None = None
    #: relative, of token losses, from the cross entropy of the model's own logits
    losses: float | None = None


class WrongError(Exception):
    """qaxis is on, and the model computes something else; the message says what."""


class RefusedError(Exception):
    """qaxis does not take the model; the message is the reason it gives."""


def _line(error: BaseException, length: int = 300) -> str:
    """What an error says, in one line; of qaxis's own without the name of the class, which the row has."""
    return re.sub(r"\bmodel='\w+': allowed is ", "allowed is ", " ".join(str(error).split()))[:length]


class Subject:
    """One model with its inputs, and what eager attention makes of them."""

    def __init__(self, architecture: Architecture) -> None:
        self.model = build(architecture)
        self.arguments = self._accepted()
        self.text = text_name(self.arguments)
        self.eager = self.logits()
        if not torch.equal(self.eager, self.logits()):
            raise NotBuiltError("its logits are not the same twice")

    def _accepted(self) -> dict[str, torch.Tensor]:
        errors = []
        for arguments in inputs(self.model):
            try:
                found = self.logits(arguments)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {_line(error, 80)}")
                continue
            if found is not None and found.ndim == 3 and torch.isfinite(found).all():
                return arguments
            errors.append("no finite logits [B, N, V]")
        raise NotBuiltError(f"no input fits: {errors[0]}")

    def logits(self, arguments: dict[str, torch.Tensor] | None = None) -> Any:
        """float ``[B, N, V]``."""
        out = self.model(**(self.arguments if arguments is None else arguments), use_cache=False)
        return getattr(out, "logits", None)

    def with_text(self, ids: torch.Tensor, **more: Any) -> dict[str, Any]:
        return {**self.arguments, self.text: ids, **more}

    def future(self, logits: torch.Tensor) -> float:
        """Relative difference from ``logits``, before the last token, when only that is another."""
        ids = self.arguments[self.text].clone()
        ids[:, -1] = 3 + (ids[:, -1] - 2) % 50
        return _difference(self.logits(self.with_text(ids))[:, :-1], logits[:, :-1])

    def padded(self, filler: int | None = None) -> torch.Tensor:
        """Logits of a batch of two, the second padded on the left (with ``filler``), without those of the padding."""
        ids = self.arguments[self.text].repeat(2, 1)
        mask = torch.ones_like(ids)
        mask[1, :7] = 0
        if filler is not None:
            ids[1, :7] = filler
        arguments = {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in self.arguments.items()}
        mask_name = self.text.replace("input_ids", "attention_mask")
        logits = self.logits({**arguments, self.text: ids, mask_name: mask})
        return torch.cat([logits[0], logits[1, 7:]])

    def decoded(self) -> torch.Tensor:
        """Logits of the last tokens, one at a time with a cache."""
        ids = self.arguments[self.text]
        out = self.model(**self.with_text(ids[:, :PREFIX]), use_cache=True)
        if getattr(out, "past_key_values", None) is None:
            raise NotImplementedError("no cache")
        steps = []
        for i in range(PREFIX, ids.shape[1]):
            more = self.with_text(ids[:, i : i + 1], past_key_values=out.past_key_values)
            out = self.model(**more, use_cache=True)
            steps.append(out.logits[:, -1])
        return torch.stack(steps, 1)

    def encoded(self) -> list[torch.Tensor]:
        """What the model's encoders make of a source and of a picture; empty where it has none that takes them."""
        source = {k: v for k, v in self.arguments.items() if k != self.text}
        found = [_tried(lambda: self.model.get_encoder()(**source))] if source else []
        found += [_tried(lambda x=x: self.model.get_image_features(pixel_values=x)) for x in pictures(self.model)]
        return [tensor for output in found if output is not None for tensor in _tensors(output)]

    def implementations(self) -> dict[int, Any]:
        """Of every configuration in the model."""
        configs = [self.model.config, *(m.config for m in self.model.modules() if hasattr(m, "config"))]
        configs += [x for c in configs for x in vars(c).values() if isinstance(x, tf.PreTrainedConfig)]
        return {id(c): c._attn_implementation for c in configs if hasattr(c, "_attn_implementation")}

    def traces(self) -> list[str]:
        """What qaxis left on modules: attributes, hooks (transformers has some of its own)."""
        left = []
        for name, module in self.model.named_modules():
            left += [f"{name}.{x}" for x in vars(module) if x.startswith("_qaxis")]
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            left += [f"{name}, a hook" for hook in hooks if str(hook.__module__).startswith("qaxis")]
        return left

    def recurrent(self) -> bool:
        return any(RECURRENT.search(type(m).__name__) for m in self.model.modules())


def _tensors(output: Any) -> list[torch.Tensor]:
    """The tensors in an output of a model."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    found = float((got - wanted).abs().max() / wanted.abs().max())
    return found if found == found else float("inf")


def _tried(measure: Any) -> Any:
    """What eager attention makes of it; None where the model itself cannot."""
    try:
        return measure()
    except Exception:
        return None


def survey(architecture: Architecture) -> Row:
    """One row: the outcome, and the reason where it is not equal."""
    row = Row(architecture.model_type, architecture.name, architecture.kind)
    try:
        subject = Subject(architecture)
    except NotBuiltError as error:
        row.outcome, row.reason = "not built", _line(error)
        return row
    if architecture.kind == "causal" and subject.recurrent():
        row.kind = "hybrid"
    before = subject.implementations()
    try:
        compare(subject, row)
    except RefusedError as error:
        row.outcome, row.reason = "refused", _line(error)
    except WrongError as error:
        row.outcome, row.reason = "wrong", _line(error)
    except Exception as error:
        row.outcome, row.reason = "crashed", f"{type(error).__name__}: {_line(error)}"
    stock(subject, row, before)
    return row


def stock(subject: Subject, row: Row, before: dict[int, Any]) -> None:
    """Whatever happened: after ``disable`` the model is what it was."""
    try:
        qaxis.disable(subject.model)
        problem = None
        if subject.implementations() != before:
            problem = "an implementation is not what it was"
        elif subject.traces():
            problem = f"left behind: {', '.join(subject.traces())[:80]}"
        elif not torch.equal(subject.logits(), subject.eager):
            problem = "other logits"
    except Exception as error:
        problem = f"{type(error).__name__}: {_line(error)}"
    if problem is not None:
        outcome = "crashed" if row.outcome == "crashed" else "wrong"
        row.outcome, row.reason = outcome, f"after disable: {problem}" + (f"; {row.reason}" if row.reason else "")


def compare(subject: Subject, row: Row) -> None:
    """Fill in the differences.

    Raises:
        RefusedError, WrongError: as they say.
    """
    model, future = subject.model, subject.future(subject.eager)
    measures = {"padded": subject.padded, "decode": subject.decoded}
    eager = {name: _tried(measure) for name, measure in measures.items()}
    if eager["padded"] is not None and _difference(subject.padded(filler=4), eager["padded"]) > CLOSE:
        # The model reads its padding: what attention makes of a query that may see no key is not defined.
        eager["padded"] = None
    encoded = subject.encoded()
    for budget in (qaxis.Budget(1.0), "dense"):
        try:
            qaxis.enable(model, budget, strict=True)
        except ValueError as error:
            raise RefusedError(_line(error)) from error
        try:
            every = subject.logits()
        except ValueError as error:
            raise RefusedError(f"in the first forward pass: {_line(error)}") from error
        _expect("every key kept" if budget != "dense" else "dense", every, subject.eager, row)
        if future < CLOSE < subject.future(every):
            raise WrongError("a later token changes earlier logits")
        for name, measure in measures.items():
            if eager[name] is not None and budget != "dense":
                found = _difference(measure(), eager[name])
                row.decode = max(row.decode or 0.0, found) if name == "decode" else row.decode
                _close(f"{name}, {budget}", found)
        qaxis.disable(model)
    qaxis.enable(model, FEW, strict=True)
    if torch.equal(subject.logits(), every):
        raise WrongError(f"a budget of {FEW} keys changes nothing")
    now = subject.encoded()
    if len(now) != len(encoded) or not all(map(torch.equal, now, encoded)):
        raise WrongError("an encoder is not left alone")
    qaxis.disable(model)
    if row.kind in ("causal", "hybrid"):
        losses(subject, row)


def _close(what: str, found: float) -> None:
    if found > CLOSE:
        raise WrongError(f"{what}: {found:.1e} from eager")


def _expect(what: str, got: torch.Tensor, wanted: torch.Tensor, row: Row) -> None:
    found = _difference(got, wanted)
    row.difference = max(row.difference or 0.0, found)
    _close(what, found)


def losses(subject: Subject, row: Row) -> None:
    """``token_losses`` against the cross entropy of the model's own logits."""
    ids = subject.arguments[subject.text]
    wanted = torch.nn.functional.cross_entropy(subject.eager[0, :-1].double(), ids[0, 1:], reduction="none")
    try:
        row.losses = _difference(qaxis.token_losses(subject.model, ids), wanted)
    except ValueError as error:
        raise WrongError(f"token_losses refused: {_line(error)}") from error
    if row.losses > CLOSE:
        raise WrongError(f"token_losses: {row.losses:.1e} from the model's own")


def chosen(quick: bool) -> list[Architecture]:
    """All of them, in a quick run a few of each kind."""
    return [a for a in architectures() if not quick or (a.model_type, a.kind) in QUICK]


@torch.inference_mode()
def survey_all(context: Context) -> list[Row]:
    """A row for every architecture that is asked for."""
    level = tf.logging.get_verbosity()
    tf.logging.set_verbosity(tf.logging.CRITICAL)
    try:
        return [survey(a) for a in context.progress(chosen(context.quick), "architectures")]
    finally:
        tf.logging.set_verbosity(level)


def every(context: Context) -> Result:
    """The table of architectures."""
    rows = survey_all(context)
    counts = Counter(row.outcome for row in rows)
    built = len(rows) - counts["not built"]
    bad = [row for row in rows if row.outcome in ("wrong", "crashed")]
    differences = [row.difference for row in rows if row.outcome == "equal" and row.difference is not None]
    values = {name: value(counts[key], "architectures", n=built) for name, key in OUTCOMES.items()}
    values["difference"] = value(max(differences, default=0.0), "of the largest logit", n=len(differences))
    verdict = "each equal to eager with every key kept, or refused with the reason"
    if bad:
        verdict = f"{len(bad)} wrong: " + "; ".join(f"{r.model_type}: {r.reason}" for r in bad)[:400]
    return Result(
        passed=not bad and counts["equal"] > 0,
        verdict=verdict,
        headline=f"{built} architectures: {counts['equal']} equal, {counts['refused']} refused with the reason",
        values=values,
        cases=built,
        data={"rows": [asdict(row) for row in rows]},
        checks=[f"{row.model_type}, {row.name}" for row in rows if row.outcome != "not built"],
    )


OUTCOMES = {
    "equal": "equal", "refused": "refused", "wrong": "wrong", "crashed": "crashed", "not_built": "not built",
}  # fmt: skip
