"""The form of notebook 00: two menus and a button that writes ``workshop.yaml``."""

from dataclasses import replace

from workshop_utils.checkpoints.sources.catalogue import catalogue
from workshop_utils.core.settings import load_settings, save_settings


def settings_form():
    """An ipywidgets box with the current settings; **Save** stores what is chosen."""
    import ipywidgets

    settings = load_settings()
    menu, devices = ipywidgets.Dropdown, ["auto", "cpu", "gpu"]
    model = menu(options=list(catalogue()), value=settings.model, description="Model")
    device = menu(options=devices, value=settings.device, description="Device")
    button = ipywidgets.Button(description="Save", icon="check")
    answer = ipywidgets.HTML()

    def save(_):
        save_settings(replace(settings, model=model.value, device=device.value))
        saved = f"Saved: {model.value} on {device.value}."
        answer.value = f"{saved} Restart the kernels of open notebooks to use it."

    button.on_click(save)
    return ipywidgets.VBox([model, device, button, answer])
