"""Documents as people have them: files of many kinds, folders and objects. What they say is what is read."""

from ooc_influence.corpus.cache import CachedFolder, cached_folder
from ooc_influence.corpus.corpus_file import is_hub_id, local_path
from ooc_influence.corpus.documents import (
    BETWEEN,
    USUAL,
    Documents,
    answer_start,
    answer_text,
    as_text,
    first_answer,
    open_documents,
    open_records,
    question_start,
    text_digest,
    text_of,
    usual_form,
)
from ooc_influence.corpus.lexical import Bm25, bm25

__all__ = [
    "BETWEEN", "USUAL", "Bm25", "CachedFolder", "Documents", "answer_start", "answer_text", "as_text", "bm25",
    "cached_folder", "first_answer", "is_hub_id", "local_path", "open_documents", "open_records", "question_start",
    "text_digest", "text_of", "usual_form",
]  # fmt: skip
