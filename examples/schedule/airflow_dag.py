"""An Airflow DAG that runs a pipeline on a Ray cluster every night.

The job's id is made of the definition, the code and the run's date: a retry of the task attaches to the job that runs
already, so nothing is paid for twice.
"""

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

with DAG(
    dag_id="nightly_questions",
    schedule="0 2 * * *",
    start_date=datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/Berlin")),
    catchup=False,  # one run asks everything that is not answered yet
    max_active_runs=1,
):
    BashOperator(
        task_id="submit",
        bash_command=(
            "rabatch submit /etc/rabatch/pipeline.yaml --address http://ray-head:8265 "
            "--run-id {{ ts_nodash }}-{{ dag_run.run_type }}"
        ),
        env={"BUCKET": "documents"},
        append_env=True,
        retries=2,
        retry_delay=timedelta(minutes=5),
        execution_timeout=timedelta(hours=12),
    )
