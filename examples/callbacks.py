"""Callbacks: a CSV file of epochs, Weights & Biases, MLflow, and a run that stops where it is good enough.

python examples/callbacks.py --wandb my-project      # or --mlflow my-experiment; without either the CSV file alone
"""

import argparse
import csv
from pathlib import Path

import torch

import taps_ext
from taps_ext.data import open_source
from taps_ext.train import Callback
from taps_ext.zoo import small_resnet


class CsvFile(Callback):
    """A line for each epoch of each run: the run's name, then the numbers."""

    def __init__(self, path):
        self.path = Path(path)

    def on_epoch(self, run, values):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(["run", *values])
            writer.writerow([run.name, *values.values()])


class Wandb(Callback):
    """Weights & Biases: a run of theirs for each of ours, which goes on under the same id where ours does."""

    def __init__(self, project):
        import wandb  # pip install wandb

        self.wandb, self.project = wandb, project

    def on_start(self, run):
        file = None if run.out is None else run.out / f"{run.name}.wandb"
        known = file.read_text() if file is not None and file.exists() and run.epoch else None
        self.run = self.wandb.init(
            project=self.project, name=run.name, config=dict(run.settings), id=known, resume="allow"
        )
        if file is not None:
            file.write_text(self.run.id)

    def on_step(self, run, step, values):
        self.run.log(dict(values), step=step)

    def on_epoch(self, run, values):
        self.run.log({f"epoch/{key}": value for key, value in values.items() if value is not None})

    def on_end(self, run, results):
        for name, result in results.items():
            self.run.summary.update({f"{name}/{key}": value for key, value in result.test.items()})
        self.run.finish()


class MLflow(Callback):
    """MLflow: the settings as a file, numbers by epoch, the task files as artifacts."""

    def __init__(self, experiment):
        import mlflow  # pip install mlflow

        self.mlflow = mlflow
        mlflow.set_experiment(experiment)

    def on_start(self, run):
        self.mlflow.start_run(run_name=run.name)
        self.mlflow.log_dict(dict(run.settings), "settings.json")

    def on_epoch(self, run, values):
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}
        self.mlflow.log_metrics(numbers, step=values["epoch"])

    def on_end(self, run, results):
        for result in results.values():
            self.mlflow.log_metrics({f"{result.task}_test_{key}": value for key, value in result.test.items()})
            if result.file is not None:
                self.mlflow.log_artifact(result.file)
        self.mlflow.end_run("FINISHED" if results else "KILLED")


class GoodEnough(Callback):
    """Stop once a metric is reached; the run then counts as finished."""

    def __init__(self, metric, value):
        self.metric, self.value = metric, value

    def on_epoch(self, run, values):
        return values[self.metric] >= self.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--wandb", metavar="PROJECT")
    parser.add_argument("--mlflow", metavar="EXPERIMENT")
    parser.add_argument("--out", default="runs/callbacks")
    args = parser.parse_args()

    callbacks = [CsvFile(Path(args.out) / "epochs.csv"), GoodEnough("val_accuracy", 0.99)]
    if args.wandb:
        callbacks.append(Wandb(args.wandb))
    if args.mlflow:
        callbacks.append(MLflow(args.mlflow))

    torch.manual_seed(0)
    data = open_source("digits:rotated")
    model = taps_ext.TaskModel(small_resnet(), taps_ext.TapsConfig(lam=0.5))
    model.add_task("rotated", num_classes=data.num_classes)
    task = taps_ext.Task(train=data.train, val=data.val, test=data.test, labels=data.classes)
    config = taps_ext.TrainConfig(epochs=args.epochs, lr=0.02, warmup_epochs=0, out=args.out)
    result = taps_ext.Trainer(model, {"rotated": task}, config, callbacks=callbacks).fit()["rotated"]
    print(f"test accuracy {100 * result.test['accuracy']:.1f} %; epochs in {args.out}/epochs.csv")


if __name__ == "__main__":
    main()
