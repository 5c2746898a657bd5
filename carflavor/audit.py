"""What is wrong with a dataset, before anything is made of it: `report.json` and `report.html`."""

import logging
import time
from dataclasses import dataclass

import mlflow

from carflavor import report, tracking
from carflavor.data import duplicates, layouts
from carflavor.data.audit import count_findings, find_all, parse_fail_on, say_counts, say_refusal, summarise
from carflavor.data.decoding import Task, decode_photos
from carflavor.data.locations import resolve_output
from carflavor.data.sources import default_out, name_source, open_source
from carflavor.data.thumbnails import read_thumbnails
from carflavor.progress import progress_bar

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AuditConfig:
    """Parameters of the step; the same names stand in MLproject.

    Attributes:
        source: Folder of photos, or `sample` for the embedded drawings.
        layout: One of `carflavor.data.layouts.LAYOUTS`.
        fail_on: Kinds of findings at which the step fails, after it has written its reports; separated by commas.
        workers: Processes that decode; 0 for one a core.
        out: Folder to write to. Empty for one under `carflavor.data.locations.data_home()`.
    """

    source: str = "sample"
    layout: str = "auto"
    fail_on: str = ""
    workers: int = 0
    out: str = ""


def audit(config):
    """Looks at every photo of a dataset, and reports what is wrong with it.

    Args:
        config: `AuditConfig`.

    Returns:
        `Path` of the folder with `report.json` and `report.html`.

    Raises:
        ValueError: If the source has no known layout; or, once the reports are written and logged, if kinds of findings
            named by `fail_on` were found.
    """
    with tracking.step_run("audit", config):
        out, summary, refusal = write_audit(config)
        mlflow.log_metrics({name: summary[name] for name in ("photos", "seconds")} | count_findings(summary))
        mlflow.log_artifact(out / "report.json")
        mlflow.log_artifact(out / "report.html")
        _logger.info("Reports: %s", out)
        if refusal:
            raise ValueError(refusal)
    return out


def write_audit(config):
    """Writes `report.json` and `report.html`; no MLflow run.

    Args:
        config: `AuditConfig`.

    Returns:
        `Path` of the folder with the files, the content of `report.json` as dict, and the sentence that says which
        kinds of `fail_on` were found, or None.

    Raises:
        ValueError: If the source has no known layout.
    """
    fail_on = parse_fail_on(config.fail_on)
    out = resolve_output(config.out, "out") if config.out else None
    store = open_source(config.source)
    out = out or default_out("audits", config.source, store)
    # A box whose corners are not in order is a finding.
    dataset = layouts.read_dataset(store, config.layout, refuse_boxes=False)
    for warning in dataset.warnings:
        _logger.warning("%s", warning)
    started = time.perf_counter()
    facts = _examine(store, dataset.splits, config.workers)
    groups = duplicates.group_near_duplicates(duplicates.stack_hashes(facts))
    findings = find_all(dataset, dataset.splits, facts, groups, store.names)
    _logger.info("Found: %s", say_counts(findings))
    summary = {
        "source": name_source(config.source, store),
        "layout": dataset.layout,
        "seconds": round(time.perf_counter() - started, 2),
        **summarise(dataset, dataset.splits, facts, findings),
    }
    out.mkdir(parents=True, exist_ok=True)
    thumbnails = read_thumbnails(store, report.pick_photos(findings), dataset.photos)
    _write_reports(out, summary, report.build_audit_sections(findings, thumbnails))
    return out, summary, say_refusal(findings, fail_on, store.place, out / "report.html")


def _examine(store, splits, workers):
    """Returns what is known of each photo, a list of dicts in the order of the splits."""
    tasks = [Task(split, row, photo) for split, photos in splits.items() for row, photo in enumerate(photos)]
    known = {}
    with progress_bar("audit", len(tasks)) as progress:
        # No pools, so that no box is cut out: one that cannot be is a finding of its own.
        for entries in decode_photos(tasks, store, {}, 0, workers):
            known |= {(entry["split"], entry["row"]): entry for entry in entries}
            progress.update(len(entries))
    return [known[task.split, task.row] for task in tasks]


def _write_reports(out, summary, audit_sections):
    headline = [("photos", f"{summary['labelled_photos']:,}"), ("readable", f"{summary['photos']:,}")]
    headline += [(split, f"{count:,}") for split, count in summary["photos_by_split"].items()]
    headline += [("classes", f"{len(summary['photos_by_class']):,}"), ("layout", summary["layout"])]
    sections = [*audit_sections, report.Section("Photos by class", table=summary["photos_by_class"])]
    if summary["warnings"]:
        sections.insert(1, report.Section("Said when the labels were read", "\n".join(summary["warnings"])))
    report.write_report(out / "report.html", f"Audit of {summary['source']}", headline, sections)
    report.write_json(out / "report.json", summary)
