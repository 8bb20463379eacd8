"""What JupyterLab adds to a notebook as soon as its kernel runs, added when it is opened.

Version control does not keep it, for it names the reader's Python; without it every page would open as one that is
changed already.
"""

from ipykernel.ipkernel import IPythonKernel
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager


class Contents(AsyncLargeFileManager):
    "Reads notebooks as they will be once their kernel runs."

    async def get(self, *arguments, **options):
        model = await super().get(*arguments, **options)
        if model["type"] == "notebook" and model["content"]:
            metadata = model["content"]["metadata"]
            metadata.setdefault("language_info", IPythonKernel.language_info)
            specs = self.parent.kernel_spec_manager.get_all_specs()
            if spec := specs.get(metadata.get("kernelspec", {}).get("name")):
                metadata["kernelspec"]["display_name"] = spec["spec"]["display_name"]
        return model
