"""target=azureml of the step deploy: a packed model behind a managed online endpoint, and traffic to it by steps.

An endpoint has two deployments, blue and green. One carries the traffic; the other takes the new model, is asked for a
photo past the traffic rules, and only then gets traffic. Whatever fails puts the traffic back where it was.
"""

import base64
import contextlib
import datetime
import json
import logging
import math
import re
import tempfile
from pathlib import Path

import mlflow

from carflavor.azure.arm import ResourceManager, print_call, score
from carflavor.azure.registration import prepare_model, register_model
from carflavor.azure.settings import deployment_properties, read_settings
from carflavor.azure.workspace import find_workspace
from carflavor.data.example import example_photo
from carflavor.data.locations import resolve_input
from carflavor.flavor import manifest_sha256, read_manifest
from carflavor.scoring import BOX_COLUMNS

# Azure's rule for endpoints.
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9-]{1,30}[a-zA-Z0-9]")
# When a deployment got its model: of two that carry traffic, the older one is what was there before.
_DEPLOYED_TAG = "carflavor.deployed"
_MODEL_TAG = "carflavor.model"
_ENTRA_SCOPE = "https://ml.azure.com/.default"

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
    if not _NAME.fullmatch(config.name):
        raise ValueError(
            "Expected name to be 3 to 32 letters, digits and hyphens, from a letter to a letter or digit, as Azure "
            f"wants an endpoint. Received: name={config.name!r}"
        )
    endpoint = Endpoint(ResourceManager(find_workspace(config.workspace), config.dry_run), config.name)
    if config.action == "status":
        found = endpoint.status()
    elif config.action == "rollback":
        answer = endpoint.roll_back()
        found = None if config.dry_run else {**endpoint.status(), "answer": answer}
    elif config.action == "delete":
        endpoint.delete()
        found = None
    else:
        answer = _roll_out(endpoint, config, steps, digest)
        found = None if config.dry_run else {**endpoint.status(), "answer": answer}
    if found:
        mlflow.log_dict(found, "endpoint.json")
        print(json.dumps(found, indent=2, ensure_ascii=False), flush=True)
    return found


def _read_steps(text):
    """Returns the percentages of `traffic=10,50,100`."""
    words = [word.strip() for word in text.split(",")]
    steps = [int(word) for word in words if word.isdecimal()]
    if len(steps) != len(words) or steps != sorted(set(steps)) or steps[0] < 1 or steps[-1] != 100:
        raise ValueError(f"Expected traffic to be rising percentages up to 100, as 10,50,100. Received: {text!r}")
    return steps


def _roll_out(endpoint, config, steps, digest):
    if not config.model:
        raise ValueError(f"Expected model, which action={config.action} deploys. Received: model=''")
    path = Path(resolve_input(config.model, "model"))
    read_manifest(path, digest or None)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    settings = read_settings(config.config and resolve_input(config.config, "config"), size)
    # The endpoint serves these very files or does not start.
    settings["environment_variables"] = {
        "CARFLAVOR_EXPECTED_SHA256": manifest_sha256(path),
        **settings["environment_variables"],
    }
    workspace = endpoint.arm.get()
    if workspace is None:
        raise ValueError(f"Expected a workspace {endpoint.arm.workspace.resource_id}, got nothing there")
    if config.action == "update" and endpoint.find() is None:
        raise ValueError(f"Expected an endpoint {config.name} to update, got none: action=create makes it")
    tracking_uri = endpoint.arm.workspace.tracking_uri or workspace["properties"]["mlFlowTrackingUri"]
    model, version = _register(endpoint, config, path, tracking_uri)
    endpoint.create(workspace["location"])
    return endpoint.roll_out(
        {
            "location": workspace["location"],
            "tags": {
                _MODEL_TAG: f"models:/{model}/{version}",
                _DEPLOYED_TAG: datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
            },
            "sku": {"name": "Default", "capacity": settings["instance_count"]},
            "properties": deployment_properties(
                settings, f"{endpoint.arm.workspace.resource_id}/models/{model}/versions/{version}"
            ),
        },
        json.loads((path / "classes.json").read_text(encoding="utf-8")),
        steps,
    )


def _register(endpoint, config, path, tracking_uri):
    """Returns the name and version of the model in the workspace's registry, after registering it where need be."""
    named = re.fullmatch(r"models:/([^/@]+)[/@](.+)", config.model)
    name = named[1] if named else config.name
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_model(path, Path(folder) / "model")
        if prepared == path and named and named[2].isdecimal() and mlflow.get_registry_uri() == tracking_uri:
            return name, named[2]
        return name, register_model(endpoint.arm, prepared, name, tracking_uri)


class Endpoint:
    """A managed online endpoint.

    Args:
        arm: `ResourceManager` of its workspace.
        name: Name of the endpoint.
    """

    def __init__(self, arm, name):
        self.arm = arm
        self._name = name
        self._path = f"/onlineEndpoints/{name}"

    def find(self):
        """Returns what Azure says of the endpoint once nothing changes it, or None where there is none."""
        return self.arm.wait_until_settled(self._path)

    def status(self):
        """Returns a dict of what stands on the endpoint."""
        found = self._expect()
        properties = found["properties"]
        return {
            "name": self._name,
            "state": properties["provisioningState"],
            "scoring_uri": properties.get("scoringUri"),
            "traffic": _traffic(found),
            "deployments": {
                deployment["name"]: {
                    "state": deployment["properties"]["provisioningState"],
                    # .../models/<name>/versions/<version>
                    "model": "/".join((deployment["properties"].get("model") or "").split("/")[-3::2]),
                    "instances": (deployment.get("sku") or {}).get("capacity"),
                    "instance_type": deployment["properties"].get("instanceType"),
                }
                for deployment in self._deployments()
            },
        }

    def create(self, location):
        """Creates the endpoint where there is none, and where one ended Failed again."""
        found = self.find()
        if found and found["properties"]["provisioningState"] == "Succeeded":
            return
        # As azureml-mlflow makes it.
        properties = {"authMode": "AMLToken", "properties": {"azureml.mlflow_client_endpoint": "True"}}
        if found:
            # PUT takes away what it does not name.
            kept = ("authMode", "properties", "description", "traffic", "mirrorTraffic", "publicNetworkAccess")
            properties |= {key: found["properties"][key] for key in kept if found["properties"].get(key)}
        body = {"location": location, "identity": {"type": "SystemAssigned"}, "properties": properties}
        self.arm.change("PUT", self._path, body)

    def roll_out(self, body, class_names, steps):
        """Deploys beside what carries the traffic, asks the new deployment for a photo and moves the traffic to it.

        Args:
            body: Of the request that creates the deployment.
            class_names: What the model may answer.
            steps: Percentages of the traffic for the new deployment, the last one 100.

        Returns:
            The rows of the answer, None for a dry run.
        """
        found = self.find()
        before = _traffic(found) if found else {}
        deployments = self._deployments() if found else []
        stable = _find_stable(deployments, before)
        new = "green" if stable == "blue" else "blue"
        if any(deployment["name"] == new for deployment in deployments):
            left = self.arm.wait_until_settled(self._deployment(new))
            if left and not _serves(left):
                # Azure mends a failed deployment only sometimes.
                self._remove(new, before)
        # Of a rollout that was killed half way, the rest of the traffic goes back before its deployment changes.
        if stable and before != {stable: 100}:
            before = {stable: 100}
            self._move(before)
        try:
            _logger.info("Deploying %s/%s: Azure builds an image first, in 10 to 30 minutes", self._name, new)
            self.arm.change("PUT", self._deployment(new), body)
            answer = self.ask(new, class_names)
        except BaseException as error:
            self._say_logs(new)
            self._remove(new, before, error)
            raise
        try:
            # The first deployment of an endpoint has nobody to take traffic from.
            for step in steps if stable else [100]:
                self._move({new: 100} if step == 100 else {stable: 100 - step, new: step})
                answer = self.ask(new, class_names)
        except BaseException as error:
            self._put_back(before, error)
            raise
        return answer

    def roll_back(self):
        """Moves the traffic to the deployment that had it before; returns the rows that it answers a photo with."""
        found = self._expect()
        traffic, deployments = _traffic(found), self._deployments()
        stable = _find_stable(deployments, traffic)
        carrying = [name for name, share in traffic.items() if share]
        others = [one["name"] for one in _by_age(deployments) if one["name"] != stable and _serves(one)]
        if len(carrying) > 1:
            target = stable
        elif others:
            target = others[-1]
        else:
            raise ValueError(f"Expected another deployment of {self._name} to go back to, got only {stable or 'none'}")
        answer = self.ask(target)
        self._move({target: 100})
        return answer

    def delete(self):
        """Deletes the endpoint and its deployments."""
        if self.find() is None:
            _logger.info("There is no endpoint %s", self._name)
            return
        self.arm.change("DELETE", self._path)
        if not self.arm.dry_run:
            _logger.info("Deleted %s. The models stay registered", self._name)

    def ask(self, deployment, class_names=None):
        """Sends a photo of the sample to one deployment, in the form that Azure's server reads.

        Args:
            deployment: Name of the deployment.
            class_names: What the model may answer, if known.

        Returns:
            The rows of the answer, None for a dry run.

        Raises:
            ValueError: If the answer is no prediction.
        """
        photo, box, _ = example_photo()
        columns = ["image", *BOX_COLUMNS]
        row = [base64.b64encode(photo).decode(), *map(float, box)]
        if self.arm.dry_run:
            row[0] = f"<{len(row[0])} characters of base64>"
            body = {"input_data": {"columns": columns, "index": [0], "data": [row]}}
            print_call("POST", f"the scoring URI of {self._name}, azureml-model-deployment: {deployment}", body)
            return None
        endpoint = self._expect()
        body = {"input_data": {"columns": columns, "index": [0], "data": [row]}}
        rows = score(endpoint["properties"]["scoringUri"], self._token(endpoint), body, deployment)
        rows = rows.get("predictions") if isinstance(rows, dict) else rows
        if not _is_prediction(rows, class_names):
            raise ValueError(
                f"{self._name}/{deployment}: expected a label and its probability for a photo, got {str(rows)[:300]}"
            )
        _logger.info("%s/%s answers a photo with %s (%.2f)", self._name, deployment, rows[0]["label"], rows[0]["prob"])
        return rows

    def _expect(self):
        found = self.find()
        if found is None:
            raise ValueError(f"Expected an endpoint {self._name} in {self.arm.workspace.name}, got none")
        return found

    def _deployments(self):
        return self.arm.list(f"{self._path}/deployments")

    def _deployment(self, name):
        return f"{self._path}/deployments/{name}"

    def _token(self, endpoint):
        mode = endpoint["properties"]["authMode"].lower()
        if mode == "key":
            return self.arm.ask(f"{self._path}/listKeys")["primaryKey"]
        if mode == "amltoken":
            return self.arm.ask(f"{self._path}/token")["accessToken"]
        return self.arm.token(_ENTRA_SCOPE)

    def _move(self, traffic):
        self.arm.change("PATCH", self._path, {"properties": {"traffic": traffic}})
        if not self.arm.dry_run:
            _logger.info("Traffic of %s: %s", self._name, traffic or "none")

    def _put_back(self, before, error):
        """Puts the traffic back after an error, which gets a note where that fails, too."""
        try:
            # What failed may still be at work, and Azure refuses two at once.
            self.find()
            self._move(before)
        except ValueError as second:
            raise ValueError(
                f"{error}. The traffic could not be put back to {before} ({second}): action=rollback does that"
            ) from error

    def _remove(self, deployment, before, error=None):
        """Deletes a deployment that carries no traffic; what fails after an error is said and no more."""
        try:
            # Azure refuses to delete what its rules mention.
            if deployment in before:
                self._move({name: share for name, share in before.items() if name != deployment})
            self.arm.change("DELETE", self._deployment(deployment))
        except ValueError as second:
            if error is None:
                raise
            _logger.warning("%s/%s stays, and costs what it costs: %s", self._name, deployment, second)

    def _say_logs(self, deployment):
        """Prints what the containers of a deployment have said; nothing where Azure has nothing."""
        with contextlib.suppress(ValueError, KeyError):
            if not self.arm.dry_run:
                wanted = {"containerType": "InferenceServer", "tail": 50}
                logs = self.arm.ask(f"{self._deployment(deployment)}/getLogs", wanted)["content"]
                _logger.warning("The last lines of %s/%s:\n%s", self._name, deployment, logs)


def _traffic(endpoint):
    """Returns the shares of the deployments that carry traffic, in percent by name."""
    return {name: share for name, share in (endpoint["properties"].get("traffic") or {}).items() if share}


def _find_stable(deployments, traffic):
    """Returns the name of what carried the traffic before anything new, or None."""
    carrying = [deployment["name"] for deployment in _by_age(deployments) if traffic.get(deployment["name"])]
    return carrying[0] if carrying else None


def _by_age(deployments):
    # What others have made has no such tag, and counts as older.
    return sorted(deployments, key=lambda deployment: (deployment.get("tags") or {}).get(_DEPLOYED_TAG, ""))


def _serves(deployment):
    return deployment["properties"]["provisioningState"] == "Succeeded"


def _is_prediction(rows, class_names):
    if not isinstance(rows, list) or len(rows) != 1 or not isinstance(rows[0], dict):
        return False
    label, prob = rows[0].get("label"), rows[0].get("prob")
    if class_names is not None and label not in class_names:
        return False
    return isinstance(label, str) and isinstance(prob, int | float) and math.isfinite(prob) and 0 <= prob <= 1
