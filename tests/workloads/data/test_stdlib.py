import pytest

from workloads.data.stdlib import split_of, stdlib_documents, stdlib_files


def test_the_split_of_a_module_never_moves():
    modules = ["argparse.py", "ast.py", "calendar.py", "enum.py", "json/encoder.py", "os.py", "subprocess.py"]
    assert [module for module in modules if split_of(module) == "validation"] == [
        "calendar.py",
        "enum.py",
        "json/encoder.py",
        "subprocess.py",
    ]


def test_every_document_is_in_one_split():
    train, validation = (dict(stdlib_documents(split)) for split in ("train", "validation"))
    assert train.keys().isdisjoint(validation)
    assert {split_of(path) for path in train} == {"train"}
    assert {split_of(path) for path in validation} == {"validation"}
    share = sum(map(len, validation.values())) / sum(map(len, [*train.values(), *validation.values()]))
    assert 0.06 < share < 0.13
    assert len(train) + len(validation) > 400


def test_files_are_sorted_sources_without_tests_installed_packages_or_generated_tables():
    paths = [path for path, _ in stdlib_files()]
    assert paths == sorted(paths)
    assert all(path.endswith(".py") for path in paths)
    folders = {folder for path in paths for folder in path.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__", "encodings", "pydoc_data"}


def test_texts_are_decoded_and_not_empty():
    for split in ("train", "validation"):
        assert all(text.strip() for _, text in stdlib_documents(split))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test'"):
        next(stdlib_documents("test"))
