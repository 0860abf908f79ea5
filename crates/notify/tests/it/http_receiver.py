"""A receiver of webhooks: keeps each request as a JSON file in a folder.

http_receiver.py FOLDER STATUS,… [CERTIFICATE KEY]
Answers by the first status, then the second, and by the last from then on. Prints its port on the first line of stdout.
"""
import http.server
import json
import os
import ssl
import sys

folder, statuses, certificate, key = (sys.argv[1:] + [""] * 4)[:4]
statuses = [int(status) for status in statuses.split(",")]


class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        number = len(os.listdir(folder))
        headers = {name.lower(): value for name, value in self.headers.items()}
        path = os.path.join(folder, f"{number:04}.json")
        with open(path + ".new", "w") as file:
            json.dump({"path": self.path, "headers": headers, "body": body}, file)
        os.rename(path + ".new", path)
        self.send_response(statuses[min(number, len(statuses) - 1)])
        self.send_header("content-length", "0")
        self.send_header("location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_):
        pass


server = http.server.HTTPServer(("127.0.0.1", 0), Receiver)
if certificate:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_address[1], flush=True)
server.serve_forever()
