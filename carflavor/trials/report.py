"""What the run of a sweep shows: its trials as table, figure and page, and the best parameters as a command."""

import logging
import shlex
import time
from dataclasses import fields, replace

import optuna
import pandas as pd
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from carflavor import report, tracking
from carflavor.report.sweeps import sweep_figure
from carflavor.trials.runs import BEST_METRIC, FAILED, FINISHED, PRUNED

# With fewer trials a parameter's share is mostly chance.
_TRIALS_FOR_SHARES = 10
_FAILURES_IN_A_ROW = 3
_EXPLANATION = (
    "Above: the blue curve is the best trial. Below: its best validation accuracy by the value of each parameter. "
    "A best value at the edge of its range asks for a wider range. In brackets: the parameter's share in telling the "
    "better half of the trials from the others (PED-ANOVA); all shares together are 100 %."
)

_logger = logging.getLogger(__name__)


class SweepReport:
    """The trials of a sweep so far, and what its run shows of them.

    Args:
        client: `mlflow.MlflowClient`.
        run_id: Run of the sweep.
        settings: `carflavor.train.TrainConfig` with what is the same in all trials.
        ranges: Dict of parameter name to Optuna distribution.
        total: Number of trials in all.
        earlier: List of `carflavor.trials.runs.Trial` that earlier sweeps have done.

    Attributes:
        trials: List of all `Trial`s.
        left: Number of trials to make. One that failed in an earlier sweep is made up for.
    """

    def __init__(self, client, run_id, settings, ranges, total, earlier):
        self._client = client
        self._run_id = run_id
        self._settings = settings
        self._ranges = ranges
        self._total = total
        self._started = time.monotonic()
        self._made = 0
        self.trials = list(earlier)
        self.left = max(0, total - sum(trial.state != FAILED for trial in earlier))
        if self.best:
            self._log_best()

    @property
    def best(self):
        """The finished trial with the best accuracy, of those the first; None before there is one."""
        finished = [trial for trial in self.trials if trial.state == FINISHED]
        return max(finished, key=lambda trial: trial.accuracy, default=None)

    def add(self, trial):
        """Adds a trial that has come to its end, says so, and shows it on the run."""
        self.trials.append(trial)
        self._made += 1
        self.left -= 1
        said = [_say_result(trial)]
        if self.best is trial:
            self._log_best()
            said.append("the best so far")
        elif self.best:
            said.append(f"best so far {self.best.accuracy:.3f} (trial {self.best.number})")
        if self.left > 0:
            seconds = (time.monotonic() - self._started) / self._made * self.left
            said.append(f"{self.left} of {self._total} to go in about {_say_duration(seconds)}")
        _logger.info("%s", ", ".join(said))
        self.write()

    def refuse_failures(self):
        """Raises a ValueError if three trials have failed one after the other: then it is not the values."""
        last = self.trials[-_FAILURES_IN_A_ROW:]
        if self._made >= _FAILURES_IN_A_ROW and all(trial.state == FAILED for trial in last):
            raise ValueError(f"{len(last)} trials in a row have failed, the last one so: {last[-1].failure}")

    def _log_best(self):
        # A point each time that there is a better one: a chart that shows how long the search has paid.
        self._client.log_metric(self._run_id, BEST_METRIC, self.best.accuracy, step=self.best.number)

    def write(self):
        """Logs `trials.csv`, `comparison.png`, `report.html` and, once a trial has finished, `best.json`."""
        if not self.trials:
            return
        table = [_row(trial) for trial in sorted(self.trials, key=_rank)]
        figure = sweep_figure(self.trials, self._ranges, self.best, _shares(self.trials, self._ranges))
        lead, summary = [], []
        if best := self.best:
            self._client.log_dict(self._run_id, best.parameters, "best.json")
            self._client.set_tag(self._run_id, tracking.MODEL_TAG, f"runs:/{best.run_id}/model")
            lead = [
                f"Trial {best.number} is the best of {len(self.trials)}. It was chosen by its validation accuracy, "
                "which is a little too good for that: report what evaluate measures on the test photos.",
                f"Its model: runs:/{best.run_id}/model",
                f"Its parameters, for another training:\n{self.best_command()}",
            ]
            summary = [("best validation accuracy", f"{100 * best.accuracy:.1f} %")]
            summary += [(name, say_value(value)) for name, value in best.parameters.items()]
        sections = [report.Section("Comparison", _EXPLANATION, figure), report.Section("Trials", table=_narrow(table))]
        html = report.render_report("Trials of a sweep", summary, sections, lead)
        self._client.log_text(self._run_id, _to_csv(table), "trials.csv")
        self._client.log_figure(self._run_id, figure, "comparison.png")
        self._client.log_text(self._run_id, html, "report.html")

    def best_command(self):
        """Returns the line that trains with the best parameters."""
        config = replace(self._settings, **self.best.parameters)
        values = {field.name: getattr(config, field.name) for field in fields(config)}
        given = [f"{name}={value}" for name, value in values.items() if value != getattr(type(config), name)]
        return " ".join(["mlflow run . -e train --env-manager local", *(f"-P {shlex.quote(text)}" for text in given)])


def _rank(trial):
    return (FINISHED, PRUNED, FAILED).index(trial.state), -(trial.accuracy or 0), trial.number


def _row(trial):
    best_epoch = max(trial.accuracies, key=trial.accuracies.get) + 1 if trial.accuracies else None
    return {
        "trial": trial.number,
        "state": trial.state,
        BEST_METRIC: trial.accuracy,
        "best_epoch": best_epoch,
        "epochs": len(trial.accuracies),
        **trial.parameters,
        "minutes": trial.seconds / 60,
        "run_id": trial.run_id,
        "failure": trial.failure,
    }


def _narrow(table):
    """Returns the table without what a page has no room for."""
    failures = {"failure"} if any(row["failure"] for row in table) else set()
    left_out = {"best_epoch", "run_id", "failure"} - failures
    names = {name: {BEST_METRIC: "accuracy"}.get(name, name) for name in table[0] if name not in left_out}
    return [{title: row[name] for name, title in names.items()} for row in table]


def _to_csv(table):
    # A trial that failed at once has no best epoch; without the type the others would read 7.0.
    return pd.DataFrame(table).astype({"best_epoch": "Int64"}).to_csv(index=False)


def _shares(trials, ranges):
    finished = [trial for trial in trials if trial.state == FINISHED]
    if len(finished) < _TRIALS_FOR_SHARES or len(ranges) == 1:
        return {}
    study = optuna.create_study(direction="maximize")
    study.add_trials([trial.to_optuna(ranges) for trial in finished])
    # The better half: by default it is the best tenth, of twenty trials two, in which anything is alike by chance.
    evaluator = PedAnovaImportanceEvaluator(target_quantile=0.5)
    return get_param_importances(study, evaluator=evaluator)


def _say_result(trial):
    if trial.state == FAILED:
        return f"Trial {trial.number} failed: {trial.failure}"
    if trial.state == PRUNED:
        return f"Trial {trial.number}: given up after epoch {max(trial.accuracies) + 1} with {trial.accuracy:.3f}"
    return f"Trial {trial.number}: validation accuracy {trial.accuracy:.3f}"


def say_value(value):
    """Says the value of a parameter: numbers with four digits, of any type that Optuna gives."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _say_duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
