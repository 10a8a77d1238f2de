"""Measures of how well influence does what it is used for, and the retraining they are measured against."""

from ooc_influence.evaluate.agreement import Agreement, CheckResult, check
from ooc_influence.evaluate.bounds import CompressionErrors, ExactInfluence, reduction_bounds
from ooc_influence.evaluate.contrast import Contrast
from ooc_influence.evaluate.measures import LdsResult, auc, fuse_ranks, lds, recall_at
from ooc_influence.evaluate.removal import LeaveOneOut, RemovalCurve, leave_one_out, removal_curve
from ooc_influence.evaluate.removal_test import RemovalTest, verify_influence
from ooc_influence.evaluate.retrain import Runs, finished_runs, random_subsets, retrain
from ooc_influence.evaluate.training import Training, load_training

__all__ = [
    "Agreement", "CheckResult", "CompressionErrors", "Contrast", "ExactInfluence", "LdsResult", "LeaveOneOut",
    "RemovalCurve", "RemovalTest", "Runs", "Training", "auc", "check", "finished_runs", "fuse_ranks", "lds",
    "leave_one_out", "load_training", "random_subsets", "recall_at", "reduction_bounds", "removal_curve", "retrain",
    "verify_influence",
]  # fmt: skip
