from __future__ import annotations

import pytest

from cml_runner.clouds import REGIONS, SIZES
from cml_runner.clouds.kubernetes import catalogue
from cml_runner.clouds.kubernetes.catalogue import Size
from cml_runner.errors import ConfigurationError

T4 = {
    "nvidia.com/gpu.product": ["Tesla-T4", "Tesla-T4-SHARED"],
    "cloud.google.com/gke-accelerator": ["nvidia-tesla-t4"],
    "karpenter.k8s.aws/instance-gpu-name": ["t4"],
    "eks.amazonaws.com/instance-gpu-name": ["t4"],
    "accelerator": ["t4"],
}
SPOT = {
    "cloud.google.com/gke-spot": ["true"],
    "eks.amazonaws.com/capacityType": ["SPOT"],
    "kubernetes.azure.com/scalesetpriority": ["spot"],
    "karpenter.sh/capacity-type": ["spot"],
}


@pytest.mark.parametrize(
    ("name", "gpu", "size"),
    [
        ("s", "", Size(1, 2000)),
        ("m", "", Size(8, 32000)),
        ("l", "", Size(32, 128000)),
        ("xl", "", Size(64, 256000)),
        ("m+t4", "", Size(4, 16000, "t4", 1)),
        ("l+t4", "", Size(32, 128000, "t4", 4)),
        ("m", "t4", Size(4, 16000, "t4", 1)),
        ("xl", "h100", Size(192, 1600000, "h100", 8)),
        ("m+nvidia", "", Size(4, 16000, "nvidia", 1)),
        ("m", "mi300x", Size(4, 16000, "mi300x", 1)),  # nobody knows it: as any other
        ("2-4000", "", Size(2, 4000)),
        ("0.5-500", "", Size(0.5, 500)),
        ("8-64000+v100", "", Size(8, 64000, "v100", 1)),
        ("8-64000+v100*2", "", Size(8, 64000, "v100", 2)),
        ("8-64000", "v100", Size(8, 64000, "v100", 1)),
        ("8-64000+v100*2", "t4", Size(8, 64000, "v100", 2)),  # the type's own counts
    ],
)
def test_sizes(name: str, gpu: str, size: Size) -> None:
    assert catalogue.size([name], gpu) == size


@pytest.mark.parametrize("name", ["", "huge", "8", "0-100", "4-0", "m5.large", "4-16000+t4*x"])
def test_what_is_no_size(name: str) -> None:
    with pytest.raises(ConfigurationError, match="s, m, l, xl, or CPUS-MEGABYTES"):
        catalogue.size([name])


def test_a_size_that_a_gpu_doesnt_come_in() -> None:
    with pytest.raises(ConfigurationError, match="l with h100: Kubernetes has it as m, xl"):
        catalogue.size(["l+h100"])


def test_a_pod_has_no_second_choice() -> None:
    with pytest.raises(ConfigurationError) as caught:
        catalogue.size(["m", "huge"])
    assert len(caught.value.mistakes) == 2


@pytest.mark.parametrize("kind", catalogue.data()["gpus"])
def test_the_table_is_in_order(kind: str) -> None:
    found = [
        catalogue.size([f"{size}+{kind}"])
        for size in SIZES
        if size in catalogue.data()["gpus"][kind]
    ]
    assert found == sorted(found, key=lambda one: (one.number, one.memory, one.cpu))
    assert {one.gpu for one in found} == {kind}


def test_what_a_pod_asks_for() -> None:
    assert Size(0.5, 500).resources == {"cpu": "0.5", "memory": "500M"}
    assert Size(8, 64000, "v100", 2).resources == {
        "cpu": "8",
        "memory": "64000M",
        "nvidia.com/gpu": "2",
    }


@pytest.mark.parametrize("name", REGIONS)
def test_a_generic_region_is_the_whole_cluster(name: str) -> None:
    assert catalogue.region(name) == (name, {})


def test_a_region_is_a_label_of_nodes() -> None:
    mark, labels = catalogue.region("topology.kubernetes.io/zone=eu-west-1a")
    assert labels == {"topology.kubernetes.io/zone": "eu-west-1a"}
    assert mark == "topology.kubernetes.io_zone_eu-west-1a"
    long, _ = catalogue.region(f"a.very/{'long' * 15}=value")
    assert len(long) <= 63
    assert catalogue.VALUE.fullmatch(long)


@pytest.mark.parametrize("name", ["", "mars", "=x", "zone=", "zone=a b", "a/b/c=d"])
def test_what_is_no_region(name: str) -> None:
    with pytest.raises(ConfigurationError, match="KEY=VALUE"):
        catalogue.region(name)


@pytest.mark.parametrize(
    ("text", "image"),
    [
        ("", "ubuntu:24.04"),
        ("ubuntu", "ubuntu:24.04"),
        ("ghcr.io/actions/actions-runner", "ghcr.io/actions/actions-runner"),
        ("localhost:5000/me/image:tag", "localhost:5000/me/image:tag"),
        (f"a/b@sha256:{'0' * 64}", f"a/b@sha256:{'0' * 64}"),
    ],
)
def test_images(text: str, image: str) -> None:
    assert catalogue.image(text, Size(1, 1)) == image


def test_nvidias_image_is_meant_where_there_is_a_gpu() -> None:
    assert catalogue.image("nvidia", Size(1, 1)).startswith("nvidia/cuda:")


@pytest.mark.parametrize("text", ["two words", "UPPER", "a@sha256:12", "-x"])
def test_what_is_no_image(text: str) -> None:
    with pytest.raises(ConfigurationError, match="container image"):
        catalogue.image(text, Size(1, 1))


def test_nodes_are_chosen_by_their_labels() -> None:
    chosen = catalogue.labels(["accelerator=tesla", "a.b/c=d", "empty="])
    assert chosen == {"accelerator": "tesla", "a.b/c": "d", "empty": ""}


@pytest.mark.parametrize("text", ["word", "=x", "a=b=c", "-a=b"])
def test_what_is_no_label(text: str) -> None:
    with pytest.raises(ConfigurationError, match="write KEY=VALUE"):
        catalogue.labels([text])


@pytest.mark.parametrize(
    ("text", "toleration"),
    [
        ("gpu", {"key": "gpu", "operator": "Exists"}),
        ("gpu=yes", {"key": "gpu", "operator": "Equal", "value": "yes"}),
        ("gpu:NoSchedule", {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}),
        (
            "a.b/c=d:NoExecute",
            {"key": "a.b/c", "operator": "Equal", "value": "d", "effect": "NoExecute"},
        ),
    ],
)
def test_tolerations(text: str, toleration: dict[str, str]) -> None:
    assert catalogue.tolerations([text]) == [toleration]


@pytest.mark.parametrize("text", ["", "gpu:Never", "=x", ":NoSchedule"])
def test_what_is_no_toleration(text: str) -> None:
    with pytest.raises(ConfigurationError, match="NoSchedule, PreferNoSchedule, NoExecute"):
        catalogue.tolerations([text])


def test_gpus_are_found_by_any_of_their_labels() -> None:
    found = catalogue.nodes(Size(4, 16000, "t4", 1), {}, spot="")
    assert list(found) == ["requiredDuringSchedulingIgnoredDuringExecution"]
    assert _terms(found) == [{key: values} for key, values in T4.items()]


def test_whoever_chooses_nodes_knows_better() -> None:
    assert catalogue.nodes(Size(4, 16000, "t4", 1), {"accelerator": "x"}, spot="") == {}


def test_any_gpu_and_no_gpu_may_be_anywhere() -> None:
    assert catalogue.nodes(Size(4, 16000, "nvidia", 1), {}, spot="") == {}
    assert catalogue.nodes(Size(4, 16000), {}, spot="") == {}


def test_a_spot_machine_is_one_of_any_provider() -> None:
    found = catalogue.nodes(Size(4, 16000), {}, spot="required")
    assert _terms(found) == [{key: values} for key, values in SPOT.items()]


def test_a_spot_machine_with_a_gpu_is_both() -> None:
    found = catalogue.nodes(Size(4, 16000, "t4", 1), {}, spot="required")
    expected = [
        {kind: kinds, market: markets}
        for kind, kinds in T4.items()
        for market, markets in SPOT.items()
    ]
    assert _terms(found) == expected


def test_a_spot_machine_may_be_a_wish() -> None:
    found = catalogue.nodes(Size(4, 16000), {}, spot="preferred")
    (key,) = found
    assert key == "preferredDuringSchedulingIgnoredDuringExecution"
    assert [_labels(one["preference"]) for one in found[key]] == [
        {key: values} for key, values in SPOT.items()
    ]


def test_taints_of_spot_machines_and_gpus_are_borne() -> None:
    assert catalogue.accepted(Size(1, 1), spot=False) == []
    keys = [one["key"] for one in catalogue.accepted(Size(1, 1, "t4", 1), spot=True)]
    assert keys == [*SPOT, "nvidia.com/gpu"]


def test_tags_that_can_be_labels() -> None:
    tags = {"team": "ml", "a.b/c": "d", "repo": "https://x.example/y", "two words": "x", "e": ""}
    tags |= {"long": "x" * 64, "y" * 64: "x"}
    assert catalogue.fitting(tags) == {"team": "ml", "a.b/c": "d", "e": ""}


def _terms(found: dict[str, object]) -> list[dict[str, list[str]]]:
    required = found["requiredDuringSchedulingIgnoredDuringExecution"]
    return [_labels(one) for one in required["nodeSelectorTerms"]]  # type: ignore[index]


def _labels(term: dict[str, list[dict[str, object]]]) -> dict[str, list[str]]:
    found = {}
    for one in term["matchExpressions"]:
        assert one["operator"] == "In"
        found[str(one["key"])] = list(one["values"])  # type: ignore[call-overload]
    return found
