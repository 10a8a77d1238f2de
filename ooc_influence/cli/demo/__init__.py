"""The demo: the main job on real data, from training a model to the rows that made it wrong."""

from ooc_influence.cli.demo.run import run_demo

__all__ = ["run_demo"]
