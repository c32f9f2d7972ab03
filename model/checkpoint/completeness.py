"""Whether a checkpoint holds the tensors of its model, by their names, shapes and types."""

from model.checkpoint.source import CheckpointSource
from model.spec.config import LlamaConfig
from model.spec.scheme import Scheme
from model.spec.weights import compare_tensors, plan_weights
from parallel.errors import CheckpointError


def check_checkpoint(source: CheckpointSource, config: LlamaConfig, scheme: Scheme) -> None:
    """Raise CheckpointError unless the checkpoint holds exactly the tensors that the model needs; list up to ten
    differences of each kind.
    """
    report = compare_tensors(plan_weights(config, scheme), source.tensors, tied=config.tie_word_embeddings)
    words = report.describe(config)
    if words:
        raise CheckpointError(f"{source.path} does not fit its config: {words}")
