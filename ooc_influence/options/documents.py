"""Options of models and documents: how they are loaded and read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, TypedDict, get_args

from ooc_influence.options.extraction import ExtractionOptions, OnNonFinite, Sharded
from ooc_influence.options.option import Option
from ooc_influence.options.shared import Budgeted, Reporting

if TYPE_CHECKING:
    from pathlib import Path

    import torch


Task = Literal["causal-lm", "classification"]
Preference = Literal["dpo", "log-odds"]
Turns = Literal["last", "all"]


# fmt: off
class LoadingOptions(TypedDict, total=False):
    """How a Hugging Face model is loaded."""

    task: Annotated[Task | None, Option(
        None, '{"causal-lm", "classification"}, optional',
        "What to load it for; default what its adapter, or its configuration, says.",
        "What the model is for. Default: as its configuration says.", choices=get_args(Task))]
    adapter: Annotated["str | Path | None", Option(
        None, "str or path, optional",
        "A PEFT adapter to put on it. One with a classifier's head says how many classes there are.",
        "A PEFT adapter to put on the model.", kind="path", metavar="DIR")]
    tokenizer: Annotated["str | Path | None", Option(
        None, "str or path, optional", "Where the tokenizer is, if not with the model.",
        "Where the tokenizer is, if not with the model.", kind="path", metavar="DIR|ID")]
    revision: Annotated[str | None, Option(
        None, "str, optional", "Revision of the hub's repository.", "Revision of the hub's repository.")]
    trust_remote_code: Annotated[bool, Option(
        False, "bool", "Run Python code that comes with the model.", "Run Python code that comes with the model.")]
    allow_pickle: Annotated[bool, Option(
        False, "bool", "Load weights from ``.bin`` files too (with ``weights_only``).",
        "Load weights that are not in safetensors.")]


class FieldOptions(TypedDict, total=False):
    """Which fields of a document are what."""

    text: Annotated[str | None, Option(
        None, "str, optional",
        "Field with running text. Where no form is named, the first of these that documents have: ``text``; "
        "``prompt`` and ``completion``; ``messages`` or ``prompt`` with a server's ``choices`` or ``outputs``; "
        "``messages``.",
        "Field with running text. Default: 'text', or what documents have.", metavar="FIELD")]
    prompt: Annotated[str | None, Option(
        None, "str, optional", "Field with a prompt: only the tokens of ``completion`` are targets.",
        "Field with a prompt, with --completion: only the completion's tokens are targets.", metavar="FIELD")]
    completion: Annotated[str | None, Option(
        None, "str, optional",
        "Field with the completion of ``prompt``, or with the last reply of ``messages``: a text, or answers as "
        "servers write them, of which the first counts (:func:`ooc_influence.corpus.first_answer`).",
        "Field with the completion of --prompt, or the last reply of --messages: a text, or a server's answers.",
        metavar="FIELD")]
    messages: Annotated[str | None, Option(
        None, "str, optional",
        "Field with a chat, put through the tokenizer's template; the tokens of the assistant's replies that ``turns`` "
        "names are targets.",
        "Field with a chat: the tokens of the assistant's last reply are targets, or of all (--turns).",
        metavar="FIELD")]
    chosen: Annotated[str | None, Option(
        None, "str, optional",
        "Field with the preferred one of two completions of ``prompt``, or of two chats; with ``rejected``. A row is a "
        "pair, its loss :class:`ooc_influence.hf.PreferenceLoss`.",
        "Field with the preferred one of two completions of --prompt, or of two chats; with --rejected.",
        metavar="FIELD")]
    rejected: Annotated[str | None, Option(
        None, "str, optional", "Field with the other one.",
        "Field with the completion, or chat, that was not preferred; with --chosen.", metavar="FIELD")]
    turns: Annotated[Turns, Option(
        "last", '{"last", "all"}',
        "With chats: whether the assistant's last reply is learned, or all of its replies but those with "
        '``"weight": 0``.',
        "With chats: whether the assistant's last reply is learned, or all of them.", choices=get_args(Turns))]
    tools: Annotated[str | None, Option(
        None, "str, optional",
        "With chats: field with the tools that the chat template shows, a list of objects or its JSON.",
        "With chats: field with the tools that the chat template shows.", metavar="FIELD")]
    input_ids: Annotated[str | None, Option(
        None, "str, optional",
        "Field with tokens, a list of the model's token numbers without padding on the left: all but the first are "
        "targets.",
        "Field with a list of tokens, made beforehand: all but the first are targets.", metavar="FIELD")]
    input_labels: Annotated[str | None, Option(
        None, "str, optional",
        "With ``input_ids``: field with a label for each token, the token itself (not shifted), or -100 where it is no "
        "target.",
        "With --input-ids: field with a label for each token: the token itself, or -100 where it is no target.",
        metavar="FIELD")]
    doc_ids: Annotated[str | None, Option(
        None, "str, optional",
        "With ``input_ids``: field with a whole number for each token that says which of several documents packed "
        "together it is of. Each is a row of its own, and the number a column, ``doc_id``.",
        "With --input-ids: field with a whole number for each token, which of several documents packed together it is "
        "of. Each is a row of its own.", metavar="FIELD")]
    label: Annotated[str | None, Option(
        None, "str, optional", "With ``text``: field with the class, for sequence classification.",
        "With --text: field with the class, for sequence classification.", metavar="FIELD")]
    advantage: Annotated[str | None, Option(
        None, "str, optional",
        "Field with the advantage A of a rollout: the loss is -A times the mean, or sum, of the target tokens' "
        "log-probabilities (:class:`ooc_influence.hf.PolicyGradientLoss`).",
        "Field with the advantage of a rollout: the loss is minus it times the mean (or sum) of the targets' "
        "log-probabilities.", metavar="FIELD")]
    chat: Annotated[bool, Option(
        False, "bool", "Put prompt and completion through the chat template, as a user's and an assistant's turn.",
        "Put prompt and completion through the tokenizer's chat template.")]
    id: Annotated[str | None, Option(
        None, "str, optional", "Field with the document's name; default its number.",
        "Field with the document's name. Default: its number.", metavar="FIELD")]
    keep: Annotated[Sequence[str], Option(
        (), "sequence of str", "Further fields, kept as columns.", "Keep a field as a column; may be repeated.",
        metavar="FIELD", multiple=True)]


class ReadingOptions(FieldOptions, LoadingOptions, total=False):
    """How rows are made of documents, and the model is loaded."""

    split: Annotated[str | None, Option(None, "str, optional", "Which split, of a folder that has several.")]
    config: Annotated[str | None, Option(
        None, "str, optional", "Which configuration of a data set of the hub, or of a copy of it in a folder.",
        "Which configuration of a data set of the hub.", metavar="NAME")]
    streaming: Annotated[bool, Option(
        False, "bool",
        "Read a data set of the hub as a stream, of which only the first ``documents`` are downloaded.",
        "Read a data set of the hub as a stream: only the first --documents are downloaded.")]
    on_missing: Annotated[OnNonFinite, Option(
        "raise", '{"raise", "skip"}', "Documents whose text is missing: name the first and stop, or leave them out.",
        "Documents whose text is missing: name the first and stop, or leave them out.", choices=get_args(OnNonFinite))]
    max_length: Annotated[int | None, Option(
        None, "int, optional", "Tokens of a row; default the model's context.",
        "Tokens of a row. Default: the model's context.", kind=int, metavar="N")]
    tokens: Annotated[int | None, Option(
        None, "int, optional", "Tokens of a batch, padding included; default 8192, on a CPU 2048.",
        "Tokens of a batch, padding included. Default: 8192; on a CPU 2048.", kind=int, metavar="N")]
    batch_size: Annotated[int | None, Option(
        None, "int, optional", "Most rows of a batch.", "Most rows of a batch.", kind=int, metavar="N")]
    reduction: Annotated[Literal["mean", "sum"], Option(
        "mean", '{"mean", "sum"}', "Whether a row's loss is the mean or the sum of its tokens' losses.",
        "Whether a row's loss is the mean or the sum of its tokens' losses.", choices=("mean", "sum"),
        flag="--loss-reduction")]
    preference: Annotated[Preference, Option(
        "dpo", '{"dpo", "log-odds"}',
        "Loss of ``chosen`` and ``rejected``: DPO's, or its form without a reference, -log σ(β (log p(chosen) - "
        "log p(rejected))). Log-probabilities are sums over targets.",
        "Loss of --chosen and --rejected: DPO's, or its form without a reference.", choices=get_args(Preference))]
    beta: Annotated[float, Option(
        0.1, "float", "The factor β of that loss.", "The factor β of the loss of --chosen and --rejected.", kind=float)]
    reference: Annotated["str | Path | None", Option(
        None, "str or path, optional",
        "DPO's reference model; default the model without its PEFT adapter.",
        "DPO's reference model. Default: the model without its adapter.", kind="path", metavar="DIR|ID")]
    model_dtype: Annotated[str, Option(
        "auto", '{"auto", "float32", "bfloat16", "float16", "8bit"}',
        "Type of the model's weights; auto: as saved. 8bit needs ``bitsandbytes``.",
        "Type of the model's weights; auto: as saved.", choices=("auto", "float32", "bfloat16", "float16", "8bit"))]
    documents: Annotated[int | None, Option(
        None, "int, optional", "Use this many documents, spread evenly, or the first of a stream; default all.",
        "Use N documents, spread evenly, or the first of a stream. Default: all.", kind=int, metavar="N")]


class DocumentOptions(ReadingOptions, total=False):
    """How rows are made of documents, and of what gradients."""

    output: Annotated[Literal["gradients", "curvature"], Option(
        "gradients", '{"gradients", "curvature"}',
        '``"curvature"``: rows of randomly signed token gradients (:class:`SignedLoss`), for a Gauss-Newton matrix; '
        'with '
        "``like``.",
        "What rows are: gradients of the loss, or, for a Gauss-Newton matrix, randomly signed sums of tokens' "
        "gradients (curvature; needs --like).",
        choices=("gradients", "curvature"))]
    weights: Annotated[Literal["ggn"] | None, Option(
        None, '{"ggn"}, optional', "Weights of the tokens of curvature rows; default none.",
        "Weights of the tokens of curvature rows. Default: none.", choices=("ggn",), flag="--token-weights")]
    sign_seed: Annotated[int, Option(
        0, "int", "Seed of the signs of curvature rows.", "Seed of the signs of curvature rows.", kind=int)]


class JobOptions(DocumentOptions, Reporting, total=False):
    """How a Hugging Face model and rows of documents are made ready."""

    device: Annotated["torch.device | str | None", Option(
        None, "torch.device or str, optional", "Where the model is loaded to; default the CPU.")]


class HuggingFaceOptions(DocumentOptions, ExtractionOptions, Sharded, total=False):
    """What an extraction from a Hugging Face model takes."""


class TraceOptions(ReadingOptions, Budgeted, Reporting, total=False):
    """What a run from a model and documents to pages takes."""

    row_bytes: Annotated[int | str | None, Option(
        None, "int or str, optional",
        'Choose entries and representation for this size of a row, such as ``"8kB"`` (:class:`RowBudget`); default '
        "65,536 float16 numbers.",
        "Size of a row, such as 8kB. Default: 131 kB.", metavar="SIZE")]
    damping: Annotated[float | None, Option(
        None, "float, optional", "Relative damping of the scores; default the curvature's own for lists.",
        "Relative damping of the scores. Default: the curvature's own for lists.", kind=float, metavar="X")]
    top: Annotated[int, Option(
        10, "int", "Proponents and opponents of each query.", "Proponents and opponents of a query.", kind=int,
        least=1)]
    token_rows: Annotated[int, Option(
        5, "int", "Proponents, and opponents, of each query whose tokens are shown with their shares of the score; 0 "
        "for none.",
        "Proponents, and opponents, of a query whose tokens are shown with their shares of the score; 0: none.",
        kind=int, least=0)]
    device: Annotated["torch.device | str | None", Option(
        None, "torch.device or str, optional", "Where the model runs; default the CPU.",
        "Where the model runs, such as cuda. Default: the CPU.")]
# fmt: on
