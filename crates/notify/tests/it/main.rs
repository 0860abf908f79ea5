//! Mail and webhooks with real servers: aiosmtpd, and the HTTP server of Python.

mod mail;
mod receiver;
mod self_signed;
mod webhook;
