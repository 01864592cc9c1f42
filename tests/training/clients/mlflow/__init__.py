"""Stands in for mlflow."""

from types import SimpleNamespace

from stand_in import note, noted


class MlflowClient:
    def __init__(self, tracking_uri: str):
        self.uri = tracking_uri

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        made = [entry["name"] for entry in noted("mlflow.create_experiment")]
        return SimpleNamespace(experiment_id=str(made.index(name))) if name in made else None

    def create_experiment(self, name: str, artifact_location: str | None = None) -> str:
        number = len(noted("mlflow.create_experiment"))
        note("mlflow.create_experiment", name=name, place=artifact_location)
        return str(number)

    def create_run(self, experiment_id: str, run_name: str | None = None) -> SimpleNamespace:
        run_id = f"m{len(noted('mlflow.create_run'))}"
        note("mlflow.create_run", id=run_id, experiment=experiment_id, name=run_name, uri=self.uri)
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id: str, status: str | None = None) -> None:
        note("mlflow.update_run", id=run_id, status=status, uri=self.uri)

    def log_batch(self, run_id: str, metrics=(), params=(), tags=()) -> None:
        what = {"metrics": metrics, "params": params, "tags": tags}
        note(
            "mlflow.log_batch",
            id=run_id,
            **{name: [entry._asdict() for entry in entries] for name, entries in what.items()},
        )

    def set_terminated(self, run_id: str, status: str | None = None) -> None:
        note("mlflow.set_terminated", id=run_id, status=status)
