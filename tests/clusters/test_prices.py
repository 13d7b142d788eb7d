"""The table of machines and prices from which a plan computes a sweep's cost."""

import datetime

import pytest
import yaml

from clusters import check, prices


def test_every_machine_is_described_and_every_price_says_when_and_where_it_held():
    for name, instance in prices.INSTANCES.items():
        assert instance.name == name
        if name == prices.THIS_MACHINE:
            assert instance.usd_per_hour is None
            continue
        assert instance.gpus in (0, 1, 2, 4, 8) and instance.cpus >= 4 and instance.memory_gib >= 16
        if instance.gpus:
            assert instance.gpu.startswith("NVIDIA ") and instance.gpu_memory_gib > 20
        assert instance.source and instance.region
        if instance.usd_per_hour is not None:
            assert datetime.date.fromisoformat(instance.date) <= datetime.date(2026, 11, 29)
            assert 0.3 < instance.usd_per_hour / max(1, instance.gpus) < 15


def test_the_table_agrees_with_the_check_of_cluster_files():
    """clusters.check has CPUs, memory and GPUs of AWS machines from another source."""
    shared = check.MACHINES.keys() & prices.INSTANCES.keys()
    assert len(shared) >= 3
    for name in shared:
        ours, theirs = prices.find_instance(name), check.MACHINES[name]
        assert (ours.cpus, ours.memory_gib, ours.gpus) == (theirs.vcpus, theirs.memory_gib, theirs.gpus)


def test_an_instance_is_found_by_its_name_and_an_unknown_one_lists_the_known():
    assert prices.find_instance("p5.48xlarge").gpu == "NVIDIA H100 80GB HBM3"
    assert prices.find_instance("Standard_ND96asr_v4").usd_per_hour == 27.197
    with pytest.raises(ValueError, match=r"'p4.24xlarge' is unknown; did you mean p4d.24xlarge\? known: p4d.*a3-high"):
        prices.find_instance("p4.24xlarge")


def test_the_cheapest_instance_of_a_gpu():
    by_hand = {"p4d.24xlarge": 21.957642 / 8, "a2-highgpu-8g": 29.38708 / 8, "ND96asr_v4": 27.197 / 8}
    found = prices.cheapest_for_gpu("NVIDIA A100-SXM4-40GB")
    assert (found.name, found.usd_per_gpu_hour) == (min(by_hand, key=by_hand.get), min(by_hand.values()))
    # The 80 GB card is not the 40 GB one; a machine without a price is not the cheapest.
    assert prices.cheapest_for_gpu("NVIDIA A100-SXM4-80GB").name == "p4de.24xlarge"
    assert prices.cheapest_for_gpu("NVIDIA GeForce RTX 4090") is None


def test_the_users_own_prices_go_first():
    price = prices.price_per_gpu_hour("NVIDIA H200")
    assert price.usd == pytest.approx(63.296 / 8)
    assert "p5en.48xlarge on demand in us-east-1 on 2026-09-24" in price.source
    machine = prices.price_per_gpu_hour("NVIDIA H200", {"p5en.48xlarge": 32.0})
    assert machine.usd == 4.0 and "by the user" in machine.source
    both = prices.price_per_gpu_hour("NVIDIA H200", {"p5en.48xlarge": 32.0, "NVIDIA H200": 3.2})
    assert both.usd == 3.2
    assert prices.price_per_gpu_hour("NVIDIA L4", {"p5en.48xlarge": 32.0}).usd == 0.8048
    any_gpu = {"any": 2.0, "NVIDIA H200": 3.2}
    assert prices.price_per_gpu_hour("NVIDIA H200", any_gpu).usd == 3.2
    assert prices.price_per_gpu_hour("NVIDIA GeForce RTX 4090", any_gpu).usd == 2.0
    assert prices.price_per_gpu_hour("NVIDIA GeForce RTX 4090") is None


def test_a_machine_costs_what_its_type_does_and_a_spot_one_what_the_user_says():
    p4d = prices.INSTANCES["p4d.24xlarge"]
    on_demand, spot = prices.Hired(instance=p4d), prices.Hired(instance=p4d, spot=True)
    assert prices.price_per_machine_hour(on_demand).usd == 21.957642
    own = {"p4d.24xlarge": 21.5, "p4d.24xlarge spot": 11.5, "NVIDIA A100-SXM4-40GB": 3.0, "any": 9.0}
    assert prices.price_per_machine_hour(on_demand, own).usd == 21.5
    assert prices.price_per_machine_hour(spot, own).usd == 11.5
    assert prices.price_per_machine_hour(spot, {"p4d.24xlarge": 21.5}).usd == 21.5
    assert prices.price_per_machine_hour(on_demand, {"NVIDIA A100-SXM4-40GB": 3.0, "any": 9.0}).usd == 24.0
    assert prices.price_per_machine_hour(on_demand, {"any": 2.5}).usd == 20.0
    unknown = prices.price_per_machine_hour(spot)
    assert unknown.usd == 21.957642 and "on demand" in unknown.source and "--prices" in unknown.source
    head = prices.Hired(instance=prices.INSTANCES["m6i.4xlarge"])
    assert prices.price_per_machine_hour(head, {"any": 2.5}).usd == 0.768
    assert prices.price_per_machine_hour(prices.Hired(instance=prices.INSTANCES[prices.THIS_MACHINE])) is None
    assert prices.price_per_machine_hour(prices.Hired(instance=prices.INSTANCES["ND96amsr_A100_v4"])) is None


def test_prices_from_a_file(tmp_path):
    toml, json = tmp_path / "prices.toml", tmp_path / "prices.json"
    toml.write_text('"p4d.24xlarge" = 11.5\n"NVIDIA GeForce RTX 4090" = 1\n"p4d.24xlarge spot" = 7\n')
    json.write_text('{"p4d.24xlarge": 11.5, "NVIDIA GeForce RTX 4090": 1, "p4d.24xlarge spot": 7}')
    expected = {"p4d.24xlarge": 11.5, "NVIDIA GeForce RTX 4090": 1.0, "p4d.24xlarge spot": 7.0}
    assert prices.read_prices(toml) == prices.read_prices(json) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"p4d.24xlarge": "cheap"}', r"the price of 'p4d.24xlarge' .* is 'cheap'; expected names with USD an hour"),
        ('{"p4d.24xlarge": -1}', "is -1"),
        ('{"p4.24xlarge": 1}', "did you mean p4d.24xlarge"),
        ('{"any": 1' + "0" * 400 + "}", "the price of 'any'"),
        ("[]", "are not a table"),
        ("{", "cannot be read"),
    ],
)
def test_a_wrong_file_of_prices_says_what_is_wrong(tmp_path, text, message):
    (tmp_path / "prices.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        prices.read_prices(tmp_path / "prices.json")


def test_a_named_cluster_is_its_files_workers_at_full_size():
    cluster = prices.find_cluster("aws-p4d")
    config = yaml.safe_load((prices.CLUSTER_FILES / "aws-p4d.yaml").read_text())
    assert cluster.nodes == config["max_workers"] == 2
    assert cluster.worker == prices.Hired(instance=prices.find_instance("p4d.24xlarge"), spot=True)
    assert cluster.head == prices.Hired(instance=prices.find_instance("m6i.4xlarge"), spot=False)
    assert cluster.gpus == 16


@pytest.mark.parametrize(
    ("fields", "spot"),
    [
        ({"InstanceType": "p5.48xlarge", "InstanceMarketOptions": {"MarketType": "spot"}}, True),
        ({"InstanceType": "p5.48xlarge", "InstanceMarketOptions": {"MarketType": "capacity-block"}}, False),
        ({"machineType": "a2-highgpu-8g", "scheduling": [{"preemptible": True}]}, True),
        ({"machineType": "a2-highgpu-8g"}, False),
        ({"azure_arm_parameters": {"vmSize": "Standard_ND96asr_v4", "priority": "Spot"}}, True),
        ({"azure_arm_parameters": {"vmSize": "Standard_ND96asr_v4"}}, False),
    ],
)
def test_each_clouds_file_says_whether_its_workers_are_spot(fields, spot, tmp_path, monkeypatch):
    types = {
        "head": {"resources": {"CPU": 0}, "node_config": {"InstanceType": "a type of tomorrow"}},
        "gpu": {"resources": {"GPU": 8}, "max_workers": 4, "node_config": fields},
    }
    file = {"max_workers": 3, "head_node_type": "head", "available_node_types": types}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(file))
    monkeypatch.setattr(prices, "CLUSTER_FILES", tmp_path)
    cluster = prices.find_cluster("mine")
    assert (cluster.nodes, cluster.worker.spot, cluster.head) == (3, spot, None)


def test_an_unknown_cluster_lists_the_known_ones():
    for name in ("aws-p4", "../clusters/aws-p4d", ""):
        with pytest.raises(ValueError, match=r"is unknown; .*known: .*aws-p4d"):
            prices.find_cluster(name)
