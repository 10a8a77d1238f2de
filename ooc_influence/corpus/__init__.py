"""Documents as people have them: files of many kinds, folders and objects. What they say is what is read."""

from ooc_influence.corpus.corpus_file import Parse, local_path, open_records
from ooc_influence.corpus.documents import Documents
from ooc_influence.corpus.opening import open_documents
from ooc_influence.corpus.stored import KeptFolder, kept_folder

__all__ = ["Documents", "KeptFolder", "Parse", "kept_folder", "local_path", "open_documents", "open_records"]
