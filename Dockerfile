# A model behind carflavor.server, with only what serving needs. The build context is a folder that holds the model
# directory as `model`:
#
#     mlflow artifacts download -u models:/cars@champion -d context/model
#     docker build -f Dockerfile -t cars context
#     docker run --rm --read-only --tmpfs /tmp --memory 3g --stop-timeout 40 -p 8080:8080 cars
#
# The code that runs is the carflavor in the model: build from models that you trust.
FROM python:3.11-slim AS packages
# A mirror: --build-arg PIP_INDEX_URL=...
ARG PIP_INDEX_URL
COPY model/requirements.txt /requirements.txt
# Of MLflow, serving needs what mlflow-skinny has; the rest is trackers, databases and plots.
RUN sed 's/^mlflow==/mlflow-skinny==/' /requirements.txt > /serving.txt \
 && pip install --no-cache-dir --no-compile --target /packages --requirement /serving.txt \
 && find /packages -type d -name tests -prune -exec rm -r {} +

FROM python:3.11-slim
COPY --from=packages /packages /packages
COPY model /model
ENV PYTHONPATH=/model/code:/packages PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
USER 10001:10001
EXPOSE 8080
# 503 until a photo was scored, and whenever none is any more.
HEALTHCHECK --interval=15s --timeout=6s --start-period=60s \
 CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/health', timeout=5)"]
ENTRYPOINT ["python", "-m", "carflavor.server", "--model", "/model", "--host", "0.0.0.0", "--port", "8080"]
