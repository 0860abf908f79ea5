"""A mail server: keeps each message that it takes as a JSON file in a folder, as it understood it.

smtp_server.py FOLDER [plain|starttls|tls CERTIFICATE KEY [USER PASSWORD]]
Prints its port on the first line of stdout.
"""
import asyncio
import base64
import email
import email.policy
import json
import os
import ssl
import sys

from aiosmtpd.smtp import SMTP, AuthResult

folder, mode, certificate, key, user, password = (sys.argv[1:] + [""] * 6)[:6]


class Keep:
    async def handle_DATA(self, server, session, envelope):
        message = email.message_from_bytes(envelope.content, policy=email.policy.default)
        parts = [
            {
                "type": part.get_content_type(),
                "name": part.get_filename(),
                "base64": base64.b64encode(part.get_payload(decode=True)).decode(),
            }
            for part in message.walk()
            if not part.is_multipart()
        ]
        kept = {
            "from": envelope.mail_from,
            "to": envelope.rcpt_tos,
            "subject": message["subject"],
            "headers": message.keys(),
            "encrypted": bool(session.ssl) or mode == "tls",
            "logged_in": session.authenticated,
            "parts": parts,
        }
        path = os.path.join(folder, f"{len(os.listdir(folder)):04}.json")
        with open(path + ".new", "w") as file:
            json.dump(kept, file)
        os.rename(path + ".new", path)
        return "250 kept"


def authenticate(server, session, envelope, mechanism, data):
    good = (data.login, data.password) == (user.encode(), password.encode())
    return AuthResult(success=good, handled=False)


async def main():
    context = None
    if certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key)

    def connection():
        return SMTP(
            Keep(),
            hostname="localhost",
            tls_context=context if mode == "starttls" else None,
            require_starttls=mode == "starttls",
            auth_required=bool(user),
            auth_require_tls=mode == "starttls",
            authenticator=authenticate if user else None,
        )

    tls = context if mode == "tls" else None
    server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", 0, ssl=tls)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
