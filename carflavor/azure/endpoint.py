"""A managed online endpoint: what stands on it, who gets its traffic, and what it answers."""

import base64
import contextlib
import datetime
import logging
import math
import re

from carflavor.azure.arm import RefusedError, print_call, score
from carflavor.data.example import example_photo
from carflavor.scoring import BOX_COLUMNS

# Azure's rule for endpoints and for deployments.
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9-]{1,30}[a-zA-Z0-9]")
_ENTRA_SCOPE = "https://ml.azure.com/.default"
# What a PUT has to name of an endpoint, since it takes away what it does not name.
_KEPT = ("authMode", "properties", "description", "traffic", "mirrorTraffic", "publicNetworkAccess")

# When a deployment got its model: of two that carry traffic, the older one is what was there before.
_DEPLOYED_TAG = "carflavor.deployed"

_logger = logging.getLogger(__name__)


class Endpoint:
    """A managed online endpoint, which need not exist.

    Attributes:
        arm: `ResourceManager` of its workspace.
        name: Name of the endpoint.
    """

    def __init__(self, arm, name):
        check_name(name)
        self.arm = arm
        self.name = name
        self._path = f"/onlineEndpoints/{name}"

    def find(self):
        """Returns what Azure says of the endpoint once nothing changes it, or None where there is none."""
        return self.arm.wait_until_settled(self._path)

    def expect(self, found):
        """Returns what was found; raises ValueError where that is None."""
        if found is None:
            raise ValueError(f"Expected an endpoint {self.name} in {self.arm.workspace.name}, got none")
        return found

    def status(self):
        """Returns a dict of what stands on the endpoint at this moment, also while something changes it."""
        found = self.expect(self.arm.get(self._path))
        properties = found["properties"]
        return {
            "name": self.name,
            "state": properties["provisioningState"],
            "scoring_uri": properties.get("scoringUri"),
            "traffic": traffic(found),
            "deployments": {
                deployment["name"]: {
                    "state": deployment["properties"]["provisioningState"],
                    # .../models/<name>/versions/<version>
                    "model": "/".join((deployment["properties"].get("model") or "").split("/")[-3::2]),
                    "instances": (deployment.get("sku") or {}).get("capacity"),
                    "instance_type": deployment["properties"].get("instanceType"),
                }
                for deployment in self.deployments()
            },
        }

    def create(self, location):
        """Creates the endpoint where there is none, and where one ended Failed again."""
        found = self.find()
        if found and found["properties"]["provisioningState"] == "Succeeded":
            return
        # As azureml-mlflow makes it.
        properties = {"authMode": "AMLToken", "properties": {"azureml.mlflow_client_endpoint": "True"}}
        body = {"location": location, "identity": {"type": "SystemAssigned"}}
        if found:
            body |= {key: found[key] for key in ("location", "identity", "tags") if found.get(key)}
            properties |= {key: found["properties"][key] for key in _KEPT if found["properties"].get(key)}
        self.arm.change("PUT", self._path, {**body, "properties": properties})

    def delete(self):
        """Deletes the endpoint and its deployments."""
        if self.find() is None:
            _logger.info("There is no endpoint %s", self.name)
            return
        self.arm.change("DELETE", self._path)
        if not self.arm.dry_run:
            _logger.info("Deleted %s. The models stay registered", self.name)

    def move(self, shares):
        """Gives each deployment its share of the traffic, in percent by name; those that are not named get none."""
        self.arm.change("PATCH", self._path, {"properties": {"traffic": shares}})
        if not self.arm.dry_run:
            _logger.info("Traffic of %s: %s", self.name, shares or "none")

    def deployments(self):
        """Returns what Azure says of every deployment, as a list."""
        return self.arm.list(f"{self._path}/deployments")

    def path(self, deployment):
        """Returns the path of a deployment below the workspace."""
        return f"{self._path}/deployments/{deployment}"

    def put(self, deployment, body):
        """Creates or changes a deployment, and waits until it has come up.

        Args:
            deployment: Name of the deployment.
            body: What Azure is to have of it; the time is added to its `tags`.

        Raises:
            RefusedError: If Azure refuses it: what stood there still does.
            ValueError: If it does not come up.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        try:
            self.arm.change(
                "PUT", self.path(deployment), {**body, "tags": {**(body.get("tags") or {}), _DEPLOYED_TAG: now}}
            )
        except RefusedError as error:
            if error.is_certain:
                raise
            found = self.arm.wait_until_settled(self.path(deployment))
            if found is None or age(found) != now:
                raise
            if not serves(found):
                raise ValueError(f"{self.path(deployment).lstrip('/')} did not come up: {error}") from None

    def remove(self, deployment):
        """Deletes a deployment that carries no traffic."""
        self.arm.change("DELETE", self.path(deployment))

    def read_logs(self, deployment):
        """Returns the last lines of what the containers of a deployment have said; empty where Azure has nothing."""
        with contextlib.suppress(ValueError, KeyError):
            if not self.arm.dry_run:
                wanted = {"containerType": "InferenceServer", "tail": 50}
                return self.arm.ask(f"{self.path(deployment)}/getLogs", wanted)["content"]
        return ""

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
            print_call("POST", f"the scoring URI of {self.name}, azureml-model-deployment: {deployment}", body)
            return None
        found = self.expect(self.find())
        body = {"input_data": {"columns": columns, "index": [0], "data": [row]}}
        rows = score(found["properties"]["scoringUri"], self._token(found), body, deployment)
        rows = rows.get("predictions") if isinstance(rows, dict) else rows
        if not _is_prediction(rows, class_names):
            raise ValueError(
                f"{self.name}/{deployment}: expected a label and its probability for a photo, got {str(rows)[:300]}"
            )
        _logger.info("%s/%s answers a photo with %s (%.2f)", self.name, deployment, rows[0]["label"], rows[0]["prob"])
        return rows

    def _token(self, found):
        mode = found["properties"]["authMode"].lower()
        if mode == "key":
            return self.arm.ask(f"{self._path}/listKeys")["primaryKey"]
        if mode == "amltoken":
            return self.arm.ask(f"{self._path}/token")["accessToken"]
        return self.arm.token(_ENTRA_SCOPE)


def check_name(name):
    """Raises ValueError where Azure allows neither an endpoint nor a deployment of that name."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            "Expected name to be 3 to 32 letters, digits and hyphens, from a letter to a letter or digit, as Azure "
            f"wants it. Received: name={name!r}"
        )


def traffic(found):
    """Returns the shares of the deployments that carry traffic, in percent by name, of what `find` returned."""
    return {name: share for name, share in (found["properties"].get("traffic") or {}).items() if share}


def age(deployment):
    """Returns when a deployment, as Azure describes it, got its model; the least text where others have made it."""
    return (deployment.get("tags") or {}).get(_DEPLOYED_TAG, "")


def serves(deployment):
    """Returns whether a deployment, as Azure describes it, has come up."""
    return deployment["properties"]["provisioningState"] == "Succeeded"


def _is_prediction(rows, class_names):
    if not isinstance(rows, list) or len(rows) != 1 or not isinstance(rows[0], dict):
        return False
    label, prob = rows[0].get("label"), rows[0].get("prob")
    if class_names is not None and label not in class_names:
        return False
    return isinstance(label, str) and isinstance(prob, int | float) and math.isfinite(prob) and 0 <= prob <= 1
