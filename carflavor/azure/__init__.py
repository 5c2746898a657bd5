"""Everything that speaks to Azure ML.

    workspace.py       which workspace is meant
    settings.py        the config file: its keys, checks and defaults
    arm.py             requests to Azure Resource Manager
    registration.py    the model, as a version of the workspace's registry
    endpoint.py        a managed online endpoint, its deployments, traffic and answers
    rollout.py         target=azureml of the step deploy: create, update, status, rollback, delete
    target.py          the target `azureml` of `mlflow deployments`

The first two import nothing of Azure; the others need `pip install 'carflavor[azure]'`.
"""
