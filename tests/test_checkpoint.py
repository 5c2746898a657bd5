import keras
import numpy as np
import pytest

from carflavor.checkpoint import Checkpoint


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CARFLAVOR_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def network():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])


def save(checkpoint, network, epochs, best):
    checkpoint.save(network.variables, network if best else None, epochs=epochs, run_id="1a", history={}, best={})


def test_state_and_best_network_come_back(network):
    with Checkpoint("training") as checkpoint:
        assert (checkpoint.progress, checkpoint.epochs, checkpoint.best_path) == (None, 0, None)
        network.set_weights([np.array([[1.0], [2.0]]), np.array([3.0])])
        save(checkpoint, network, 1, best=True)
        network.set_weights([np.array([[4.0], [5.0]]), np.array([6.0])])
        save(checkpoint, network, 2, best=False)
    network.set_weights([np.zeros((2, 1)), np.zeros(1)])

    with Checkpoint("training") as checkpoint:
        assert (checkpoint.epochs, checkpoint.progress["run_id"]) == (2, "1a")
        checkpoint.restore(network.variables)
        assert [weight.ravel().tolist() for weight in network.get_weights()] == [[4.0, 5.0], [6.0]]
        best = keras.saving.load_model(checkpoint.best_path)
        assert [weight.ravel().tolist() for weight in best.get_weights()] == [[1.0, 2.0], [3.0]]
        # What progress.json does not name is gone.
        assert {path.name for path in checkpoint.folder.iterdir()} == {
            "lock",
            "progress.json",
            "state-2.npz",
            "best-1.keras",
        }
        checkpoint.finish()
    assert not checkpoint.folder.exists()


def test_process_that_dies_while_it_saves_loses_one_epoch(network, monkeypatch):
    with Checkpoint("training") as checkpoint:
        save(checkpoint, network, 1, best=True)

        def die(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr("carflavor.checkpoint.os.replace", die)
        with pytest.raises(KeyboardInterrupt):
            save(checkpoint, network, 2, best=True)
    with Checkpoint("training") as checkpoint:
        assert checkpoint.epochs == 1
        checkpoint.restore(network.variables)
        assert checkpoint.best_path.is_file()


def test_another_process_is_kept_out():
    with Checkpoint("training"):
        with pytest.raises(ValueError, match="Another process is training with the same data and settings"):
            Checkpoint("training").__enter__()
    with Checkpoint("training"), Checkpoint("another training"):
        pass


def test_damaged_state_is_refused(network):
    with Checkpoint("training") as checkpoint:
        save(checkpoint, network, 1, best=True)
        other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        with pytest.raises(ValueError, match="state-1.npz does not fit the network: delete .*training to begin anew"):
            checkpoint.restore(other.variables)


def flip(content):
    middle = len(content) // 4
    return content[:middle] + bytes(255 - byte for byte in content[middle : middle + 4]) + content[middle + 4 :]


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: b"PK", lambda content: content[: len(content) // 2], flip],
    ids=["empty", "start", "half", "bytes flipped"],
)
def test_damaged_state_is_named(network, damage):
    with Checkpoint("training") as checkpoint:
        save(checkpoint, network, 1, best=True)
        state = checkpoint.folder / "state-1.npz"
        state.write_bytes(damage(state.read_bytes()))
        with pytest.raises(ValueError, match="state-1.npz is damaged .*: delete .*training to begin anew"):
            checkpoint.restore(network.variables)


def test_damaged_progress_is_named_and_can_be_passed_over(network):
    with Checkpoint("training") as checkpoint:
        save(checkpoint, network, 1, best=True)
    (checkpoint.folder / "progress.json").write_text("")
    for _ in range(2):
        with pytest.raises(ValueError, match="progress.json is damaged .*: delete .*training to begin anew"):
            Checkpoint("training").__enter__()
    with Checkpoint("training", resume=False) as checkpoint:
        assert checkpoint.epochs == 0


def test_training_that_begins_anew_is_not_gone_on_with_from_before(network):
    with Checkpoint("training") as checkpoint:
        save(checkpoint, network, 3, best=True)
    # Killed before its first epoch: nothing is kept by it.
    with Checkpoint("training", resume=False):
        pass
    with Checkpoint("training") as checkpoint:
        assert checkpoint.progress is None
