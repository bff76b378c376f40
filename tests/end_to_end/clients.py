"""Client programs as a user starts them: none is told to trust anything."""

from __future__ import annotations

import sys

# Each prints one line of JSON for each URL of its arguments: {url: [status, headers, body]}, or {url: error}.
_SHOW = """
import json, sys
def show(url, fetch):
    try:
        status, headers, body = fetch(url)
    except Exception as error:
        print(json.dumps({url: f"{type(error).__name__}: {error}"}))
    else:
        print(json.dumps({url: [status, {k.lower(): v for k, v in headers.items()}, body]}))
"""

URLLIB = [
    sys.executable,
    "-c",
    _SHOW
    + """
import urllib.error, urllib.request
def fetch(url):
    try:
        answer = urllib.request.urlopen(url, timeout=20)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, answer.headers, answer.read().decode()
for url in sys.argv[1:]:
    show(url, fetch)
""",
]

REQUESTS = [
    sys.executable,
    "-c",
    _SHOW
    + """
import requests
def fetch(url):
    answer = requests.get(url, timeout=20)
    return answer.status_code, answer.headers, answer.text
for url in sys.argv[1:]:
    show(url, fetch)
""",
]

NODE = [
    "node",
    "-e",
    """
(async () => {
  for (const url of process.argv.slice(1)) {
    try {
      const answer = await fetch(url);
      const headers = Object.fromEntries(answer.headers);
      console.log(JSON.stringify({[url]: [answer.status, headers, await answer.text()]}));
    } catch (error) {
      console.log(JSON.stringify({[url]: String(error.cause ?? error)}));
    }
  }
})();
""",
]

# `java Fetch.java`: the source is the program. Status, the decision header and the body in Base64, tab-separated.
JAVA_SOURCE = """
import java.net.URI;
import java.net.http.*;
import java.util.Base64;

public class Fetch {
    public static void main(String[] urls) throws Exception {
        var client = HttpClient.newHttpClient();
        for (var url : urls) {
            try {
                var answer = client.send(HttpRequest.newBuilder(URI.create(url)).build(),
                                         HttpResponse.BodyHandlers.ofByteArray());
                System.out.println(url + "\\t" + answer.statusCode() + "\\t"
                    + answer.headers().firstValue("Outgate-Decision").orElse("") + "\\t"
                    + Base64.getEncoder().encodeToString(answer.body()));
            } catch (Exception error) {
                System.out.println(url + "\\t" + error);
            }
        }
    }
}
"""

CURL = ["curl", "--silent", "--show-error", "--max-time", "20"]
