"""The HTTP verdict and the mitmproxy addons that apply it."""
