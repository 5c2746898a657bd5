"""Requests to Azure Resource Manager about one workspace, and to the endpoints that it runs."""

import json
import logging
import os
import time

try:
    from azure.core import PipelineClient
    from azure.core.exceptions import AzureError, ClientAuthenticationError
    from azure.core.pipeline.policies import BearerTokenCredentialPolicy, RetryPolicy, UserAgentPolicy
    from azure.core.rest import HttpRequest
    from azure.identity import DefaultAzureCredential
except ImportError as error:
    raise ImportError(f"Azure ML needs packages that are not here ({error}): pip install 'carflavor[azure]'") from error

from carflavor.version import __version__

# The version that azureml-mlflow speaks: what either of them has made, the other reads.
_API_VERSION = "2022-02-01-preview"
# Resource Manager and where tokens for it come from. `ARM_CLOUD_METADATA_URL`, which azureml-mlflow and Azure's command
# line read, names others.
_CLOUDS = {
    "AzureCloud": ("https://management.azure.com", "login.microsoftonline.com"),
    "AzureChinaCloud": ("https://management.chinacloudapi.cn", "login.chinacloudapi.cn"),
    "AzureUSGovernment": ("https://management.usgovcloudapi.net", "login.microsoftonline.us"),
}
_ADVICE = {
    401: "Log in by `az login`, or set AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET",
    403: "The account needs the role AzureML Data Scientist or Contributor on the workspace",
    404: "Look whether the name and the workspace are spelt right",
    409: "Something else is changing it: look at action=status and run this again when that has ended",
    429: "Azure takes fewer requests than were sent: run this again later",
}
_METHODS = frozenset({"GET", "PUT", "PATCH", "DELETE", "POST"})
_SECONDS_BETWEEN_POLLS = 5  # where Azure does not say
_SECONDS_TO_WAIT = 3600  # building the image of a deployment can take half an hour
_SECONDS_TO_CONNECT = 30  # azure-core tries for five minutes, four times over, without a word
_BACKOFF = 0.8  # seconds before a second try, twice as many before each further one
_LONGEST_PAUSE = 120  # seconds between two requests, whatever Azure asks for
_SECONDS_TO_ANSWER = 120  # of azure-core 300

_logger = logging.getLogger(__name__)


class RefusedError(ValueError):
    """Azure has refused a request that was to change something, which therefore is what it was.

    Attributes:
        is_certain: Whether that is certain. Where an answer was lost, and what was sent again, Azure may be at work on
            the first request and refuse the second.
    """

    def __init__(self, message, is_certain=True):
        super().__init__(message)
        self.is_certain = is_certain


class ResourceManager:
    """Reads and changes what a workspace has.

    Every method takes the path below the workspace, such as `/onlineEndpoints/cars`.

    Args:
        workspace: `carflavor.azure.workspace.Workspace`.
        dry_run: Whether requests that change something are printed instead of sent.
    """

    def __init__(self, workspace, dry_run=False):
        self.workspace = workspace
        self.dry_run = dry_run
        self._url, authority = _find_cloud()
        self._credential = DefaultAzureCredential(authority=authority)
        self._client = _client(self._url, BearerTokenCredentialPolicy(self._credential, f"{self._url}/.default"))

    def get(self, path=""):
        """Returns what is at a path, or None where there is nothing."""
        response = self._send("GET", path)
        if response.status_code == 404:
            return None
        return _read(response, "GET", self._name(path))

    def expect_workspace(self):
        """Returns what Azure says of the workspace; raises ValueError where there is none."""
        found = self.get()
        if found is None:
            raise ValueError(f"Expected a workspace {self.workspace.resource_id}, got nothing there")
        return found

    def list(self, path):
        """Returns everything in a collection, as a list."""
        found, answer = [], self.get(path)
        while answer:
            found += answer["value"]
            link = answer.get("nextLink")
            answer = _read(self._send("GET", path, url=self._own(link)), "GET", self._name(path)) if link else None
        return found

    def ask(self, path, body=None):
        """Returns the answer to a POST that changes nothing, by which Azure gives what is secret or long."""
        return _read(self._send("POST", path, body), "POST", self._name(path))

    def change(self, method, path, body=None):
        """Sends a PUT, PATCH or DELETE and waits until Azure has done what it says.

        Raises:
            RefusedError: If Azure refuses it.
            ValueError: If it fails, or an hour has passed.
        """
        what = self._name(path)
        if self.dry_run:
            print_call(method, self._address(path), body)
            return
        response = self._send(method, path, body)
        if method == "DELETE" and response.status_code == 404:
            return
        try:
            _read(response, method, what)
        except ValueError as error:
            is_certain = response.status_code != 409 and response.status_code < 500
            raise RefusedError(str(error), is_certain) from None
        self._wait_for(response, method, path)

    def wait_until_settled(self, path):
        """Returns what is at a path once nothing changes it any more, or None where there is nothing."""
        deadline = time.monotonic() + _SECONDS_TO_WAIT
        while time.monotonic() < deadline:
            found = self.get(path)
            if found is None or _state(found) in ("Succeeded", "Failed", "Canceled"):
                return found
            time.sleep(_SECONDS_BETWEEN_POLLS)
        raise ValueError(_too_long("GET", self._name(path)))

    def token(self, scope):
        """Returns an access token of Microsoft Entra for a scope."""
        try:
            return self._credential.get_token(scope).token
        except ClientAuthenticationError as error:
            raise ValueError(_no_credentials(error)) from None

    def _wait_for(self, response, method, path):
        what = self._name(path)
        deadline = time.monotonic() + _SECONDS_TO_WAIT
        url = response.headers.get("Azure-AsyncOperation")
        # Without it: a Location that is answered 202 until the end, or the state of the thing itself.
        location = response.headers.get("Location") if response.status_code == 202 else None
        while url or location:
            if time.monotonic() > deadline:
                raise ValueError(_too_long(method, what))
            time.sleep(_seconds_to_wait(response))
            response = self._send("GET", path, url=self._own(url or location))
            answer = _read(response, method, what)
            if url is None and response.status_code != 202:
                break
            status = answer.get("status")
            if status in ("Failed", "Canceled"):
                raise ValueError(f"{method} of {what} ended {status}: {_message(answer)}")
            if status == "Succeeded":
                break
        if method != "DELETE":
            found = self.wait_until_settled(path)
            if found is None or _state(found) != "Succeeded":
                raise ValueError(f"{method} of {what} ended {_state(found or {}) or 'with nothing there'}")

    def _send(self, method, path="", body=None, url=None):
        request = HttpRequest(method, url or self._address(path), json=body)
        return _send(self._client, request, self._name(path))

    def _address(self, path):
        return f"{self._url}{self.workspace.resource_id}{path}?api-version={_API_VERSION}"

    def _own(self, url):
        # The token goes where the token is for.
        if not url.startswith(f"{self._url}/"):
            raise ValueError(f"Expected Azure to name an address of {self._url} to ask next, got {url!r}")
        return url

    def _name(self, path):
        return path.lstrip("/") or f"workspace {self.workspace.name}"


def score(url, token, body, deployment):
    """Sends a body to one deployment of an endpoint, past its traffic rules.

    Args:
        url: Scoring URI of the endpoint.
        token: Its key or token.
        body: What `json.dumps` takes.
        deployment: Name of the deployment.

    Returns:
        The answer's JSON.

    Raises:
        ValueError: If it is refused or not answered by JSON.
    """
    headers = {"Authorization": f"Bearer {token}", "azureml-model-deployment": deployment}
    # Not four times over: it may have traffic while it keeps this photo waiting.
    retries = {"retry_read": 0, "retry_status": 1}
    response = _send(_client(url), HttpRequest("POST", url, json=body, headers=headers), deployment, **retries)
    return _read(response, "POST", f"a photo to {deployment}")


def print_call(method, url, body=None):
    """Prints a request that is not sent."""
    lines = [f"{method} {url}", *([] if body is None else [json.dumps(body, indent=2, ensure_ascii=False)])]
    print("\n".join(lines), flush=True)


def _find_cloud():
    """Returns the address of Resource Manager without a slash at the end, and the host that gives tokens."""
    name = os.environ.get("AZUREML_CURRENT_CLOUD", "")
    if url := os.environ.get("ARM_CLOUD_METADATA_URL"):
        clouds = _read(_send(_client(url), HttpRequest("GET", url), url), "GET", url)
        found = next((cloud for cloud in clouds if cloud["name"] == name), clouds[0])
        login = found["authentication"]["loginEndpoint"].removeprefix("https://")
        return found["resourceManager"].rstrip("/"), login.rstrip("/")
    if name and name not in _CLOUDS:
        raise ValueError(f"Expected AZUREML_CURRENT_CLOUD to be one of {', '.join(_CLOUDS)}, got {name!r}")
    return _CLOUDS[name or "AzureCloud"]


def _client(url, *policies):
    retries = _Retries(retry_backoff_factor=_BACKOFF)
    return PipelineClient(url, policies=[UserAgentPolicy(f"carflavor/{__version__}"), retries, *policies])


class _Retries(RetryPolicy):
    """azure-core's retries, which would sleep for a day without a word where `Retry-After` says so."""

    def get_retry_after(self, response):
        return min(super().get_retry_after(response) or 0, _LONGEST_PAUSE)


def _send(client, request, what, **retries):
    timeouts = {"connection_timeout": _SECONDS_TO_CONNECT, "read_timeout": _SECONDS_TO_ANSWER}
    try:
        # Whatever this module sends can be sent twice. By itself the policy takes PATCH and POST for what cannot.
        return client.send_request(request, retry_on_methods=_METHODS, **timeouts, **retries)
    except ClientAuthenticationError as error:
        raise ValueError(_no_credentials(error)) from None
    except AzureError as error:
        raise ValueError(f"{request.method} of {what} was not answered: {error.message.splitlines()[0]}") from error


def _seconds_to_wait(response):
    milliseconds, seconds = response.headers.get("x-ms-retry-after-ms"), response.headers.get("Retry-After")
    try:
        wanted = float(milliseconds) / 1000 if milliseconds else float(seconds or _SECONDS_BETWEEN_POLLS)
    except ValueError:
        # HTTP allows a date as well.
        wanted = _SECONDS_BETWEEN_POLLS
    return min(max(wanted, 0), _LONGEST_PAUSE)


def _read(response, method, what):
    if response.status_code >= 400:
        advice = _ADVICE.get(response.status_code)
        raise ValueError(
            f"{method} of {what} was answered {response.status_code}: {_message(response)}"
            + (f". {advice}" if advice else "")
        )
    try:
        return response.json() if response.content else {}
    except ValueError:
        raise ValueError(f"{method} of {what}: expected JSON, got {response.text()[:200]!r}") from None


def _message(answer):
    """Returns Azure's own words about an error, from a response or the body of one, on one line."""
    try:
        error = (answer if isinstance(answer, dict) else answer.json())["error"]
        text = f"{error['code']}: {error['message']}"
    except (ValueError, KeyError, TypeError):
        text = str(answer if isinstance(answer, dict) else answer.text())[:500]
    return " ".join(text.split()).rstrip(".")


def _state(found):
    return found.get("properties", {}).get("provisioningState", "Succeeded" if found else "")


def _no_credentials(error):
    return f"Expected credentials for Azure, got none that work. {_ADVICE[401]}. {error.message.splitlines()[0]}"


def _too_long(method, what):
    return f"{method} of {what} did not end within {_SECONDS_TO_WAIT} s; action=status shows how it goes on"
