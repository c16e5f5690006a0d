"""Every failure that kolotune expects, as one tree.

    KolotuneError                     1   anything below; never raised itself
    ├── ConfigError                   2   a flag, a config file or a combination of them is wrong
    ├── DataError                     3   the chats can't be used
    ├── ModelError                    4   the base model or an adapter can't be used
    │   ├── ModelNotFoundError        5   no such model or folder
    │   ├── AccessError               6   the hub wants a login or an approval
    │   └── OfflineError              7   the hub or the package index can't be reached
    ├── TemplateError                 8   the chat template can't be used for training
    ├── TrainingError                 9   training stopped
    ├── ToolchainError               10   llama.cpp is missing, too old or failed
    ├── ArtifactError                11   a file that was made, or given, is not what it should be
    ├── RunFolderError               12   the run folder is missing, busy or not a run folder
    ├── SpaceError                   13   not enough disk or memory
    ├── ContainerError               14   Docker or the container failed in another way than these:
    │   ├── DockerDownError          15   Docker is not installed, not running, or may not be used
    │   ├── ImageMissingError        16   the container's image has not been built
    │   ├── ImageBuildError          17   building the image failed
    │   ├── ContainerMissingError    18   there is no such container
    │   ├── SimilarContainerError    19   there is none of that name, but one of a similar name
    │   ├── ContainerStoppedError    20   the container is not running
    │   ├── ContainerPausedError     21   the container is paused
    │   ├── ContainerLostError       22   the container was stopped or restarted while a verb ran in it
    │   └── ContainerVersionError    23   the container's kolotune is another version than the client
    ├── OllamaError                  24   the Ollama server refused, failed, or says other than what was sent
    │   └── OllamaDownError          25   there is no Ollama server where one was looked for
    ├── FidelityError                28   what is served is not the model that was trained
    ├── ManifestError                26   there is no usable manifest, or something is not what it says
    ├── HubError                     27   the hub refused what was pushed, or the repository is not as it should be
    ├── LaunchError                  29   a scheduler or another machine refused, can't be reached, or lost the job
    └── Interrupted                 130   Ctrl-C or a termination signal

Each carries one line of cause, one line of what to do (``hint``) and the exit code above. The command
line prints both and no traceback; anything else that is raised is a bug and shows its traceback.
"""

from __future__ import annotations


class KolotuneError(Exception):
    """Base of all expected failures.

    Args:
        cause: what went wrong, one line, with file and line where there is one.
        hint: what the user can do about it, one line.
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
    default_hint = "`kolotune models` lists what can be tuned here."


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
    default_hint = "Use a base model whose chat template kolotune can prove, or mend the template."


class TrainingError(KolotuneError):
    exit_code = 9
    default_hint = "The log in the run folder has the details; --use-checkpoint goes on from the last good state."


class ToolchainError(KolotuneError):
    exit_code = 10
    default_hint = "`kolotune doctor` shows what is missing and how to get it."


class ArtifactError(KolotuneError):
    exit_code = 11
    default_hint = "Run the same command again: the damaged part is made anew."


class RunFolderError(KolotuneError):
    exit_code = 12
    default_hint = "`kolotune runs` lists those that are here; `kolotune run DATA --output-dir FOLDER` makes one."


class SpaceError(KolotuneError):
    exit_code = 13
    default_hint = "Free some space, or choose another --output-dir."


class ContainerError(KolotuneError):
    exit_code = 14
    default_hint = "`kolotune container status` shows what is there."


class DockerDownError(ContainerError):
    exit_code = 15
    default_hint = "Install or start Docker; where it listens elsewhere, set DOCKER_HOST."


class ImageMissingError(ContainerError):
    exit_code = 16
    default_hint = "Build it: kolotune container build"


class ImageBuildError(ContainerError):
    exit_code = 17


class ContainerMissingError(ContainerError):
    exit_code = 18
    default_hint = "Make it: kolotune container start"


class SimilarContainerError(ContainerError):
    exit_code = 19


class ContainerStoppedError(ContainerError):
    exit_code = 20
    default_hint = "Start it: kolotune container start"


class ContainerPausedError(ContainerError):
    exit_code = 21
    default_hint = "Let it go on: kolotune container start"


class ContainerLostError(ContainerError):
    exit_code = 22
    default_hint = "Start it (kolotune container start), then run the same command again: what was done stays."


class ContainerVersionError(ContainerError):
    exit_code = 23
    default_hint = "Make it anew: kolotune container build, then kolotune container start --anew"


class OllamaError(KolotuneError):
    exit_code = 24
    default_hint = "The server's own log has the details (`ollama serve` prints it)."


class OllamaDownError(OllamaError):
    exit_code = 25
    default_hint = "Start it (`ollama serve`, or the app); where it listens elsewhere, set OLLAMA_HOST."


class FidelityError(KolotuneError):
    exit_code = 28
    default_hint = "`kolotune compare RUN` shows what was measured at each stage."


class ManifestError(KolotuneError):
    exit_code = 26
    default_hint = "Run the same command as before: what is not as it was made is made anew, and the manifest with it."


class HubError(KolotuneError):
    exit_code = 27
    default_hint = "Run the same command again: what the hub has already is not sent twice."


class LaunchError(KolotuneError):
    exit_code = 29
    default_hint = "Without --submit, `kolotune launch` shows each command, to be tried by hand."


class Interrupted(KolotuneError):
    exit_code = 130
    default_hint = "Run the same command again; with --use-checkpoint, training goes on where it stopped."
