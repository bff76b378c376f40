// An origin that speaks HTTP/2 and HTTP/1.1 by ALPN, and HTTP/1.1 without TLS, until its standard input ends.
// Arguments: chain, key, port with TLS, port without.
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { createSecureServer } from "node:http2";

const [chain, key, port, plain] = process.argv.slice(2);
const options = { cert: readFileSync(chain), key: readFileSync(key), allowHTTP1: true };
const CHUNK = Buffer.alloc(1 << 16, "outgate ");

function send(response, left) {
  while (left > 0) {
    const piece = left < CHUNK.length ? CHUNK.subarray(0, left) : CHUNK;
    left -= piece.length;
    if (!response.write(piece) && left > 0) {
      response.once("drain", () => send(response, left));
      return;
    }
  }
  response.end();
}

function sum(request, response) {
  const hash = createHash("sha256");
  let length = 0;
  request.on("data", (data) => ((length += data.length), hash.update(data)));
  request.on("end", () => response.end(JSON.stringify({ length, sha256: hash.digest("hex") })));
}

function answer(request, response) {
  response.setHeader("x-spoken", request.httpVersion);
  const path = request.url.split("?")[0];
  if (path.startsWith("/bytes/")) {
    const length = Number(path.slice("/bytes/".length));
    response.setHeader("content-length", length);
    send(response, length);
  } else if (path === "/sum") {
    sum(request, response);
  } else if (path === "/early") {
    response.writeEarlyHints({ link: "</style.css>; rel=preload; as=style" });
    setTimeout(() => response.end("late"), 50);
  } else {
    const host = request.headers.host ?? request.headers[":authority"];
    response.end(JSON.stringify({ spoken: request.httpVersion, method: request.method, host, path }));
  }
}

const server = createSecureServer(options, answer);
server.on("checkContinue", (request, response) => {
  response.writeContinue();
  answer(request, response);
});
server.on("sessionError", () => {});
server.on("clientError", (error, socket) => socket.destroy());
process.stdin.on("end", () => process.exit()).resume();
server.listen(Number(port), "::", () => createServer(answer).listen(Number(plain), "::", () => console.log("ready")));
