"""A checkpoint, a run or an export to its evaluation report."""

from pathlib import Path

from vpmoe.data.dataset import trained_render
from vpmoe.evals.suite import EvalConfig, EvalReport, eval_path, evaluate, write_eval
from vpmoe.storage.manifest import MANIFEST_NAME
from vpmoe.train.state import load_student


def evaluate_checkpoint(checkpoint: Path, config: EvalConfig) -> tuple[EvalReport, Path]:
    """The report on a checkpoint (or on a run's newest one), and where it was written.

    The report lies in the run's folder as `eval-step-NNNNNN-NAME.json`; `vpmoe report` looks there.

    Raises:
        CheckpointError: If there is no complete checkpoint.
    """
    checkpoint = Path(checkpoint)
    student, manifest = load_student(checkpoint, device=config.device)
    if config.render is None and not config.data:
        render = trained_render(manifest["inputs"])
        config = config.model_copy(update={"render": render})
    run_dir = checkpoint.parent if (checkpoint / MANIFEST_NAME).is_file() else checkpoint
    model = {
        "name": student.config.name,
        "run": run_dir.resolve().name,
        "step": manifest["step"],
        "tokens_seen": manifest["tokens_seen"],
        "config_fingerprint": manifest["fingerprint"],
    }
    report = evaluate(student, config, model=model)
    out = eval_path(run_dir, manifest["step"], config.name)
    write_eval(out, report)
    return report, out
