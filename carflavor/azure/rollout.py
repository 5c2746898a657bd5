"""target=azureml of the step deploy: a packed model behind a managed online endpoint, and traffic to it by steps.

An endpoint has two deployments, blue and green. One carries the traffic; the other takes the new model, is asked for a
photo past the traffic rules, and only then gets traffic. Whatever fails puts the traffic back where it was.
"""

import json
import logging
import re
import tempfile
from pathlib import Path

import mlflow

from carflavor.azure.arm import RefusedError, ResourceManager
from carflavor.azure.endpoint import Endpoint, age, check_name, serves, traffic
from carflavor.azure.registration import prepare_model, register_model
from carflavor.azure.settings import deployment_properties, read_settings
from carflavor.azure.workspace import find_workspace
from carflavor.data.locations import resolve_input
from carflavor.flavor import manifest_sha256, read_manifest

# Azure's rule for models.
_MODEL_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,254}")
_MODEL_TAG = "carflavor.model"

_logger = logging.getLogger(__name__)


def deploy_to_azure(config, digest=""):
    """Does what `action` says with the endpoint `name` of a workspace.

    `create` and `update` register the model where the workspace does not know it, create or change the idle one of
    the endpoint's two deployments, send it a photo of the sample, and move the traffic to it by the steps of
    `traffic`, with a photo after each. `rollback` moves the traffic to the other deployment, `delete` removes the
    endpoint with what belongs to it.

    Args:
        config: `carflavor.deploy.DeployConfig`.
        digest: SHA-256 that the model's manifest must have, or an empty text for any.

    Returns:
        A dict: the endpoint's `name`, `state`, `scoring_uri`, `traffic` and `deployments`, None after `delete` and a
        dry run; and after `create`, `update` and `rollback` also `answer`, the rows that the photo was answered with.

    Raises:
        ValueError: If a parameter is not what is expected, Azure refuses something, or the deployment fails or does
            not answer the photo; the traffic is then what it was before.
    """
    steps = _read_steps(config.traffic)
    check_name(config.name)
    endpoint = Endpoint(ResourceManager(find_workspace(config.workspace), config.dry_run), config.name)
    if config.action not in ("create", "update"):
        # Of a workspace that is misspelt, Azure would say that it has no such endpoint.
        endpoint.arm.expect_workspace()
    if config.action == "status":
        found = endpoint.status()
    elif config.action == "rollback":
        answer = _roll_back(endpoint)
        found = None if config.dry_run else {**endpoint.status(), "answer": answer}
    elif config.action == "delete":
        endpoint.delete()
        found = None
    else:
        answer = _deploy(endpoint, config, steps, digest)
        found = None if config.dry_run else {**endpoint.status(), "answer": answer}
    if found:
        print(json.dumps(found, indent=2, ensure_ascii=False), flush=True)
        mlflow.log_dict(found, "endpoint.json")
    return found


def _read_steps(text):
    """Returns the percentages of `traffic=10,50,100`."""
    words = [word.strip() for word in text.split(",")]
    steps = [int(word) for word in words if word.isdecimal()]
    if len(steps) != len(words) or steps != sorted(set(steps)) or steps[0] < 1 or steps[-1] != 100:
        raise ValueError(f"Expected traffic to be rising percentages up to 100, as 10,50,100. Received: {text!r}")
    return steps


def _deploy(endpoint, config, steps, digest):
    if not config.model:
        raise ValueError(f"Expected model, which action={config.action} deploys. Received: model=''")
    name = _name_of_model(config)
    path = Path(resolve_input(config.model, "model"))
    read_manifest(path, digest or None)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    settings = read_settings(config.config and resolve_input(config.config, "config"), size)
    # The endpoint serves these very files or does not start.
    settings["environment_variables"] = {
        "CARFLAVOR_EXPECTED_SHA256": manifest_sha256(path),
        **settings["environment_variables"],
    }
    workspace = endpoint.arm.expect_workspace()
    if config.action == "update" and endpoint.find() is None:
        raise ValueError(f"Expected an endpoint {config.name} to update, got none: action=create makes it")
    tracking_uri = endpoint.arm.workspace.tracking_uri or workspace["properties"]["mlFlowTrackingUri"]
    version = _register(endpoint, config, path, name, tracking_uri)
    endpoint.create(workspace["location"])
    return _roll_out(
        endpoint,
        {
            "location": workspace["location"],
            "tags": {_MODEL_TAG: f"models:/{name}/{version}"},
            "sku": {"name": "Default", "capacity": settings["instance_count"]},
            "properties": deployment_properties(
                settings, f"{endpoint.arm.workspace.resource_id}/models/{name}/versions/{version}"
            ),
        },
        json.loads((path / "classes.json").read_text(encoding="utf-8")),
        steps,
    )


def _name_of_model(config):
    """Returns what the model is called in the workspace's registry, which is the endpoint's name for a path."""
    named = re.fullmatch(r"models:/([^/@]+)[/@].+", config.model)
    name = named[1] if named else config.name
    if not _MODEL_NAME.fullmatch(name):
        raise ValueError(
            "Expected the model's name to be letters, digits, dots, hyphens and underscores, from a letter or digit, "
            f"as Azure wants it, got {name!r}: package registers it under another one by register_as"
        )
    return name


def _register(endpoint, config, path, name, tracking_uri):
    """Returns the version of the model in the workspace's registry, after registering it where need be."""
    version = re.fullmatch(r"models:/[^/@]+/(\d+)", config.model)
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_model(path, Path(folder) / "model")
        if prepared == path and version and mlflow.get_registry_uri() == tracking_uri:
            return version[1]
        return register_model(endpoint.arm, prepared, name, tracking_uri)


def _roll_out(endpoint, body, class_names, steps):
    """Deploys beside what carries the traffic, asks the new deployment for a photo and moves the traffic to it.

    Args:
        endpoint: `Endpoint`.
        body: Of the request that creates the deployment.
        class_names: What the model may answer.
        steps: Percentages of the traffic for the new deployment, the last one 100.

    Returns:
        The rows of the answer, None for a dry run.
    """
    found = endpoint.find()
    before = traffic(found) if found else {}
    deployments = endpoint.deployments() if found else []
    stable = _find_stable(deployments, before)
    new = "green" if stable == "blue" else "blue"
    # Of a rollout that was killed half way, the rest of the traffic goes back before its deployment changes: Azure
    # deletes nothing that has traffic.
    if stable and before != {stable: 100}:
        before = {stable: 100}
        endpoint.move(before)
    if any(deployment["name"] == new for deployment in deployments):
        left = endpoint.arm.wait_until_settled(endpoint.path(new))
        if left and not serves(left):
            # Azure mends a failed deployment only sometimes.
            endpoint.remove(new)
    if not endpoint.arm.dry_run:
        _logger.info("Deploying %s/%s: Azure builds an image first, in 10 to 30 minutes", endpoint.name, new)
    try:
        endpoint.put(new, body)
    except RefusedError:
        # What stood there, for action=rollback, still does.
        raise
    except BaseException:
        _clear_away(endpoint, new)
        raise
    moved = False
    try:
        answer = endpoint.ask(new, class_names)
        # The first deployment of an endpoint has nobody to take traffic from.
        for step in steps if stable else [100]:
            moved = True
            endpoint.move({new: 100} if step == 100 else {stable: 100 - step, new: step})
            answer = endpoint.ask(new, class_names)
    except BaseException as error:
        # First of all, before what may take long.
        if moved:
            _put_back(endpoint, new, before, error)
        _clear_away(endpoint, new)
        raise
    return answer


def _put_back(endpoint, new, before, error):
    """Puts the traffic back after an error, which is told along where that fails, too."""
    _logger.warning("Putting the traffic of %s back", endpoint.name)
    try:
        # What failed may still be at work, and Azure refuses two at once.
        endpoint.find()
        endpoint.move(before)
    except ValueError as second:
        raise ValueError(
            f"{error}. The traffic could not be put back to {before} ({second}): action=status shows where it is, and "
            f"where {new} has any action=rollback takes it back"
        ) from error


def _clear_away(endpoint, deployment):
    """Deletes a deployment that has failed, after its last words: action=rollback would go to it."""
    if lines := endpoint.read_logs(deployment):
        _logger.warning("The last lines of %s/%s:\n%s", endpoint.name, deployment, lines)
    try:
        endpoint.remove(deployment)
        _logger.warning("Removed %s/%s", endpoint.name, deployment)
    except ValueError as error:
        _logger.warning("%s/%s stays, and costs what it costs: %s", endpoint.name, deployment, error)


def _roll_back(endpoint):
    """Moves the traffic to the deployment that had it before; returns the rows that it answers a photo with."""
    found = endpoint.expect(endpoint.find())
    shares, deployments = traffic(found), endpoint.deployments()
    stable = _find_stable(deployments, shares)
    others = [one for one in sorted(deployments, key=age) if one["name"] != stable and serves(one)]
    # A newer one is what a rollout that was killed has left: it never had all of the traffic.
    since = max((age(one) for one in deployments if one["name"] == stable), default="")
    older = [one["name"] for one in others if age(one) <= since]
    if len(shares) > 1:
        target = stable
    elif older:
        target = older[-1]
    else:
        newer = ", ".join(one["name"] for one in others)
        raise ValueError(
            f"Expected a deployment of {endpoint.name} from before {stable or 'any traffic'} to go back to, got "
            + (f"only {newer}, which is newer: action=update brings one up" if newer else "none")
        )
    answer = endpoint.ask(target)
    endpoint.move({target: 100})
    return answer


def _find_stable(deployments, shares):
    """Returns the name of what carried the traffic before anything new, or None."""
    carrying = [deployment["name"] for deployment in sorted(deployments, key=age) if shares.get(deployment["name"])]
    return carrying[0] if carrying else None
