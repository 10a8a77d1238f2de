"""Hugging Face models: from a model and a file of documents to a gradient store. Needs the extra ``hf``."""

from ooc_influence.hf.collect import CollectCallback, collect_callback
from ooc_influence.hf.extraction import Job, extract, extract_shards, job_of, prepare
from ooc_influence.hf.labels import Labels
from ooc_influence.hf.lora import LoraTraining, lora_training
from ooc_influence.hf.losses import CausalLoss, ClassificationLoss, PolicyGradientLoss, SignedLoss
from ooc_influence.hf.models import Loaded, load, load_base, load_shapes, open_documents
from ooc_influence.hf.padding import ClassifierCollator, Collator, context_length
from ooc_influence.hf.preference import PairCollator, PreferenceLoss
from ooc_influence.hf.samples import Samples
from ooc_influence.hf.tokens import Fields, token_texts

__all__ = [
    "CausalLoss", "ClassificationLoss", "ClassifierCollator", "Collator", "CollectCallback", "Fields", "Job",
    "Labels", "Loaded", "LoraTraining", "PairCollator", "PolicyGradientLoss", "PreferenceLoss", "Samples",
    "SignedLoss", "collect_callback", "context_length", "extract", "extract_shards", "job_of", "load", "load_base",
    "load_shapes", "lora_training", "open_documents", "prepare", "token_texts",
]  # fmt: skip
