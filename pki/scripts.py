"""Programs of a few lines that fetch each URL given, one for each runtime that has no client program of its own.

For each they print `answered STATUS URL`, or `refused URL` and why. They follow no redirect.
"""

URLLIB = """
import sys, urllib.error, urllib.request
class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_): return None
fetch = urllib.request.build_opener(NoRedirect).open
for url in sys.argv[1:]:
    try:
        with fetch(url) as answer: print("answered", answer.status, url)
    except urllib.error.HTTPError as e: print("answered", e.code, url)
    except Exception as e: print("refused", url, type(e).__name__, e)
"""

REQUESTS = """
import sys, requests
for url in sys.argv[1:]:
    try: print("answered", requests.get(url, allow_redirects=False).status_code, url)
    except Exception as e: print("refused", url, type(e).__name__, e)
"""

HTTPX = """
import sys, httpx
for url in sys.argv[1:]:
    try: print("answered", httpx.get(url).status_code, url)
    except Exception as e: print("refused", url, type(e).__name__, e)
"""

AIOHTTP = """
import aiohttp, asyncio, sys
async def main():
    async with aiohttp.ClientSession(trust_env=True) as session:
        for url in sys.argv[1:]:
            try:
                async with session.get(url, allow_redirects=False) as answer: print("answered", answer.status, url)
            except Exception as e: print("refused", url, type(e).__name__, e)
asyncio.run(main())
"""

# Node reads no proxy variable, so where a name leads nowhere it is told the address.
NODE = """
const [where, ...urls] = process.argv.slice(1);
const here = (_, o, done) => o.all ? done(null, [{address: "127.0.0.1", family: 4}]) : done(null, "127.0.0.1", 4);
for (const url of urls)
  require("https").get(url, where == "here" ? {lookup: here} : {}, r => {
    console.log("answered", r.statusCode, url);
    r.destroy();
  }).on("error", e => console.log("refused", url, e.code, e.message));
"""

# Deno and Bun; %s is where they find their arguments.
FETCH = """
for (const url of %s) {
  try { console.log("answered", (await fetch(url, {redirect: "manual"})).status, url); }
  catch (e) { console.log("refused", url, e.code ?? "", e.message, e.cause?.message ?? ""); }
}
"""

RUBY = """
ARGV.each do |url|
  begin puts "answered #{Net::HTTP.get_response(URI(url)).code} #{url}"
  rescue => e then puts "refused #{url} #{e.class} #{e.message}" end
end
"""

PHP = r"""
set_error_handler(function ($_, $message) use (&$said) { $said .= strtr($message, "\n", " ") . " "; return true; });
foreach (array_slice($argv, 1) as $url) {
  $said = "";
  $http = ["ignore_errors" => true, "follow_location" => 0];
  if ($via = getenv("https_proxy")) $http["proxy"] = strtr($via, ["http://" => "tcp://"]);
  if (file_get_contents($url, false, stream_context_create(["http" => $http])) === false) echo "refused $url $said\n";
  else echo "answered ", explode(" ", $http_response_header[0])[1], " $url\n";
}
"""

PERL = r"""
for my $url (@ARGV) {
  my $r = HTTP::Tiny->new(verify_SSL => 1, max_redirect => 0)->get($url);
  print $r->{status} == 599 ? "refused $url $r->{content}\n" : "answered $r->{status} $url\n";
}
"""
