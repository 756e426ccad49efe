"""Prometheus and Grafana: every panel asks for metrics that clusters/README.md documents, and nobody else can look."""

import json
import re

import yaml

from tests.clusters.aws_double import CLUSTERS

MONITORING = CLUSTERS / "monitoring"


def documented() -> set[str]:
    """Names in the table of metrics of clusters/README.md, without ``ray_simla_``."""
    section = (CLUSTERS / "README.md").read_text().split("\n## Metrics\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def queries() -> dict[str, str]:
    """Expression -> panel."""
    board = json.loads((MONITORING / "grafana" / "simla_ray.json").read_text())
    return {target["expr"]: panel["title"] for panel in board["panels"] for target in panel["targets"]}


def test_every_query_names_documented_metrics_only():
    assert len(documented()) > 20
    for expression, panel in queries().items():
        names = re.findall(r"[a-zA-Z_:][\w:]*(?=\{)", expression)
        assert names and all(name.startswith("ray_simla_") for name in names), (panel, expression)
        unknown = {name.removeprefix("ray_simla_") for name in names} - documented()
        assert not unknown, f"{panel}: {unknown}"
        assert '{run=~"$run"}' in expression, panel


def test_what_is_shown():
    shown = " ".join(queries())
    for name in ("loss_total", "loss_psl", "train_pairs_per_s", "train_data_wait_fraction", "train_dropped"):
        assert f"ray_simla_{name}{{" in shown
    for name in ("train_checkpoint_step", "train_checkpoint_s", "train_restarts", "train_goodput", "val_retrieval_r10"):
        assert f"ray_simla_{name}{{" in shown


def test_panels_do_not_overlap():
    board = json.loads((MONITORING / "grafana" / "simla_ray.json").read_text())
    cells = [
        (x, y)
        for panel in board["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert board["templating"]["list"][0]["query"] == "label_values(ray_simla_train_epochs, run)"


def test_prometheus_follows_rays_list_of_nodes():
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (job,) = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    (found,) = job["file_sd_configs"]
    assert found["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


def test_only_loopback_listens_and_every_file_is_mounted():
    services = yaml.safe_load((MONITORING / "compose.yaml").read_text())["services"]
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert all(service["network_mode"] == "host" and "ports" not in service for service in services.values())
    sources = [v.split(":")[0] for service in services.values() for v in service["volumes"]]
    mounted = {(MONITORING / source).resolve() for source in sources if source.startswith("./")}
    assert mounted == {path for path in MONITORING.rglob("*") if path.is_file()} - {MONITORING / "compose.yaml"}


def test_grafana_finds_its_source():
    (source,) = yaml.safe_load((MONITORING / "grafana" / "datasources.yaml").read_text())["datasources"]
    board = json.loads((MONITORING / "grafana" / "simla_ray.json").read_text())
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}
    assert source["url"] == "http://127.0.0.1:9090"
