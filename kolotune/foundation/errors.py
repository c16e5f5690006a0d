"""The errors that kolotune expects, as one tree.

    KolotuneError                     1   base of all; never raised itself
    ├── ConfigError                   2   a flag, a config file or a combination of them is wrong
    ├── DataError                     3   the chats cannot be used
    ├── ModelError                    4   the base model or an adapter cannot be used
    │   ├── ModelNotFoundError        5   no such model or folder
    │   ├── AccessError               6   the hub wants a login or an approval
    │   └── OfflineError              7   the hub or the package index cannot be reached
    ├── TemplateError                 8   the chat template cannot be used for training
    ├── TrainingError                 9   training stopped
    ├── ToolchainError               10   llama.cpp is missing, too old or failed
    ├── ArtifactError                11   a file, made or given, is missing, damaged or of the wrong kind
    ├── RunFolderError               12   the run folder is missing, busy or not a run folder
    ├── SpaceError                   13   not enough disk or memory
    ├── ContainerError               14   Docker or the container failed in a way not listed below
    │   ├── DockerDownError          15   Docker is not installed, not running, or may not be used
    │   ├── ImageMissingError        16   the container's image has not been built
    │   ├── ImageBuildError          17   building the image failed
    │   ├── ContainerMissingError    18   there is no such container
    │   ├── SimilarContainerError    19   there is none of that name, but a similar one
    │   ├── ContainerStoppedError    20   the container is not running
    │   ├── ContainerPausedError     21   the container is paused
    │   ├── ContainerLostError       22   the container was stopped or restarted while a verb ran in it
    │   └── ContainerVersionError    23   the container's kolotune and the client differ in version
    ├── OllamaError                  24   the Ollama server refused, failed, or does not have what was sent
    │   └── OllamaDownError          25   there is no Ollama server at the address
    ├── FidelityError                28   the exported model is not the trained one
    ├── ManifestError                26   there is no usable manifest, or files differ from it
    ├── HubError                     27   the hub refused the upload, or the repository is not usable
    ├── LaunchError                  29   a scheduler or another machine refused, is unreachable, or lost the job
    └── Interrupted                 130   Ctrl-C or a termination signal

Each has a cause, a hint that says what to do, and the exit code above. The command line prints cause and hint without
a traceback. Any other exception is a bug, and its traceback is shown.
"""

from __future__ import annotations


class KolotuneError(Exception):
    """Base of all expected failures.

    Args:
        cause: what went wrong, in one line, with file and line if there are any.
        hint: what the user can do about it, in one line; empty for the default.
    """

    exit_code = 1
    default_hint = ""

    def __init__(self, cause: str, hint: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.hint = hint or self.default_hint


class ConfigError(KolotuneError):
    exit_code = 2
    default_hint = "See `kolotune run --help` for the options and their values."


class DataError(KolotuneError):
    exit_code = 3
    default_hint = "Run `kolotune check DATA` to see every problem with its line."


class ModelError(KolotuneError):
    exit_code = 4
    default_hint = "`kolotune models` lists the models that can be tuned."


class ModelNotFoundError(ModelError):
    exit_code = 5


class AccessError(ModelError):
    exit_code = 6
    default_hint = "Log in with `hf auth login`, set HF_TOKEN, or pass a file with --hf-token FILE."


class OfflineError(ModelError):
    exit_code = 7
    default_hint = "Check the network, or give a local folder as --base-model."


class TemplateError(KolotuneError):
    exit_code = 8
    default_hint = "Use another base model, or another chat template (--chat-template FILE)."


class TrainingError(KolotuneError):
    exit_code = 9
    default_hint = "The log in the run folder has the details; --use-checkpoint resumes from the last good state."


class ToolchainError(KolotuneError):
    exit_code = 10
    default_hint = "`kolotune doctor` shows what is missing and how to get it."


class ArtifactError(KolotuneError):
    exit_code = 11
    default_hint = "Run the same command again; it replaces the damaged files."


class RunFolderError(KolotuneError):
    exit_code = 12
    default_hint = "`kolotune runs` lists run folders; `kolotune run DATA --output-dir FOLDER` makes one."


class SpaceError(KolotuneError):
    exit_code = 13
    default_hint = "Free some space, or choose another --output-dir."


class ContainerError(KolotuneError):
    exit_code = 14
    default_hint = "`kolotune container status` shows the containers."


class DockerDownError(ContainerError):
    exit_code = 15
    default_hint = "Install or start Docker; if it listens at another address, set DOCKER_HOST."


class ImageMissingError(ContainerError):
    exit_code = 16
    default_hint = "Build it: kolotune container build"


class ImageBuildError(ContainerError):
    exit_code = 17


class ContainerMissingError(ContainerError):
    exit_code = 18
    default_hint = "Create it: kolotune container start"


class SimilarContainerError(ContainerError):
    exit_code = 19


class ContainerStoppedError(ContainerError):
    exit_code = 20
    default_hint = "Start it: kolotune container start"


class ContainerPausedError(ContainerError):
    exit_code = 21
    default_hint = "Resume it: kolotune container start"


class ContainerLostError(ContainerError):
    exit_code = 22
    default_hint = "Start it (kolotune container start) and run the same command again; finished work is kept."


class ContainerVersionError(ContainerError):
    exit_code = 23
    default_hint = "Create it again: kolotune container build, then kolotune container start --anew"


class OllamaError(KolotuneError):
    exit_code = 24
    default_hint = "The server's log has the details; `ollama serve` prints it."


class OllamaDownError(OllamaError):
    exit_code = 25
    default_hint = "Start it with `ollama serve` or the app; if it listens at another address, set OLLAMA_HOST."


class FidelityError(KolotuneError):
    exit_code = 28
    default_hint = "`kolotune compare RUN` shows the measurements of each stage."


class ManifestError(KolotuneError):
    exit_code = 26
    default_hint = "Run the same command as before; it replaces files that changed, and the manifest."


class HubError(KolotuneError):
    exit_code = 27
    default_hint = "Run the same command again; files that the hub already has are not sent again."


class LaunchError(KolotuneError):
    exit_code = 29
    default_hint = "Without --submit, `kolotune launch` shows each command, so that you can try it by hand."


class Interrupted(KolotuneError):
    exit_code = 130
    default_hint = "Run the same command again; with --use-checkpoint, training resumes where it stopped."


class Terminated(KeyboardInterrupt):
    """A termination signal. It ends a command as Ctrl-C does, also where Ctrl-C ends a part of it only."""
