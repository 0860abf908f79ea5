//! The witness as a process: registers on a third machine.

use crate::config::WitnessConfig;
use crate::identity::random_u128;
use crate::links;
use crate::members::{Cluster, MemberRecord};
use crate::membership::{self, Joined, Renewal, RenewalAnswer};
use crate::{cannot, cannot_listen, clock, durable, http};
use rempart_api::{Error, MemberRole};
use rempart_register::witness::{Caller, Witness};
use rempart_transport::pki::{CertificateRequest, Credentials};
use rempart_transport::{Accepted, Deadlines, EnrolmentToken, Identity, Role, TlsContext, accept, dial_http};
use rempart_types::NodeId;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// How often it asks the nodes for revocations, and renews its certificate when that is due.
const REFRESH_EVERY: Duration = Duration::from_secs(60);

fn failed(what: &str) -> impl Fn(&dyn std::fmt::Display) -> Error {
    let what = what.to_owned();
    move |cause| Error::failed(format!("cannot {what}")).cause(cause)
}

struct Files {
    pki: PathBuf,
    cluster: PathBuf,
    state: PathBuf,
}

impl Files {
    fn of(data_dir: &Path) -> Files {
        Files {
            pki: data_dir.join("pki"),
            cluster: data_dir.join("cluster.json"),
            state: data_dir.join("state"),
        }
    }
}

/// Joins the cluster and writes the configuration.
pub async fn init(
    config_path: &Path,
    token: &str,
    name: &str,
    listen: SocketAddr,
    advertise: Option<String>,
    data_dir: &Path,
) -> Result<(), Error> {
    crate::config::check_name(name).map_err(Error::invalid)?;
    let token: EnrolmentToken =
        token.parse().map_err(|e: rempart_transport::Error| Error::invalid("this is no token").cause(e))?;
    if config_path.exists() {
        return Err(Error::conflict(format!("`{}` exists already", config_path.display())));
    }
    let files = Files::of(data_dir);
    if files.cluster.exists() {
        return Err(Error::conflict(format!("there is a witness in `{}` already", data_dir.display())));
    }
    let id = NodeId(random_u128().map_err(|e| failed("draw an id")(&e))?);
    let address = advertise.clone().unwrap_or_else(|| listen.to_string());
    let me = MemberRecord { id, name: name.to_owned(), role: MemberRole::Witness, address };
    let Joined { credentials, answer } = membership::enrol(&token, me).await?;
    let failed = failed("set up the witness");
    crate::make_private_dir(data_dir).map_err(cannot("make the witness's directory", data_dir))?;
    credentials.save(&files.pki).map_err(|e| failed(&e))?;
    answer.cluster.save(&files.cluster).map_err(|e| failed(&e))?;
    if let Some(parent) = config_path.parent() {
        std::fs::create_dir_all(parent).map_err(cannot("make the configuration's directory", parent))?;
    }
    let text = WitnessConfig::template(name, listen, advertise.as_deref(), data_dir);
    durable::write(config_path, text.as_bytes()).map_err(cannot("write the configuration", config_path))
}

/// Serves until asked to stop.
pub async fn run(config: WitnessConfig, mut stop: watch::Receiver<bool>) -> Result<(), Error> {
    let files = Files::of(&config.witness.data_dir);
    let failed = failed("run the witness");
    let cluster = Cluster::load(&files.cluster).map_err(|e| failed(&e))?.ok_or_else(|| {
        Error::failed(format!("there is no witness in `{}`", config.witness.data_dir.display()))
            .hint("make one with `rempart witness init`")
    })?;
    let credentials = Credentials::load(&files.pki).map_err(|e| failed(&e))?;
    let tls = TlsContext::new(&credentials).map_err(|e| failed(&e))?;
    let directory = files.state.clone();
    let witness =
        Witness::open(&rempart_register::witness::WitnessConfig { directory }).map_err(|e| failed(&e))?;
    let listener = TcpListener::bind(config.witness.listen)
        .await
        .map_err(|e| cannot_listen(config.witness.listen, "witness.listen", &e))?;
    tracing::info!(instance = %witness.instance(), listen = %config.witness.listen, "the witness serves");
    let refreshing = tokio::spawn(refresh(files, cluster, tls.clone()));
    let admit_tls = tls.clone();
    let admit = move |socket| {
        let tls = admit_tls.clone();
        async move {
            match accept(socket, &tls, Deadlines::default()).await {
                Ok(Accepted::Http(stream)) => {
                    let peer = stream.peer().cloned().ok_or("no certificate was shown")?;
                    if tls.is_revoked(&peer) {
                        return Err("its certificate is revoked".to_owned());
                    }
                    let caller = match peer.identity.role {
                        Role::Node => Caller::Node(peer.identity.id),
                        Role::Witness => Caller::Other,
                    };
                    Ok((stream, caller))
                }
                Ok(_) => Err("a witness serves registers only".to_owned()),
                Err(error) => Err(error.to_string()),
            }
        }
    };
    crate::notify_ready();
    let serving = witness.serve(listener, admit, stop.clone());
    tokio::select! {
        () = serving => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
    refreshing.abort();
    Ok(())
}

/// Asks the nodes, one after the other until one answers, for revocations and, when due, a new certificate.
async fn refresh(files: Files, cluster: Cluster, tls: TlsContext) {
    let mut ticks = tokio::time::interval(REFRESH_EVERY);
    loop {
        ticks.tick().await;
        for node in cluster.nodes() {
            match refresh_from(&files, &tls, node).await {
                Ok(()) => break,
                Err(error) => tracing::debug!(node = node.name, %error, "no news from the node"),
            }
        }
    }
}

async fn refresh_from(files: &Files, tls: &TlsContext, node: &MemberRecord) -> Result<(), Error> {
    let failed = failed("ask for news");
    let mut credentials = Credentials::load(&files.pki).map_err(|e| failed(&e))?;
    let due = credentials.info().is_ok_and(|info| info.renewal_due(clock::wall()));
    let request = if due { Some(CertificateRequest::generate().map_err(|e| failed(&e))?) } else { None };
    let renewal = Renewal { request_pem: request.as_ref().map(|request| request.request_pem.clone()) };
    let body = serde_json::to_vec(&renewal).map_err(|e| failed(&e))?;
    let address = links::resolve(&node.address).await.map_err(|e| failed(&e))?;
    let expected = Identity { cluster: tls.identity().cluster, role: Role::Node, id: node.id };
    let stream =
        dial_http(address, tls, Some(expected), Deadlines::default()).await.map_err(|e| failed(&e))?;
    let asked = http::exchange(stream, hyper::Method::POST, "/peer/v1/renew", body.into());
    let text = tokio::time::timeout(Duration::from_secs(10), asked).await.map_err(|e| failed(&e))??;
    let answer: RenewalAnswer = serde_json::from_slice(&text).map_err(|e| failed(&e))?;
    if let (Some(request), Some(certificate)) = (request, &answer.certificate_pem) {
        let (ca, list) =
            (credentials.ca_pem().to_owned(), credentials.revocation_list_pem().map(str::to_owned));
        credentials =
            Credentials::new(request.key, certificate, &ca, list.as_deref()).map_err(|e| failed(&e))?;
        tracing::info!("certificate renewed");
    }
    if let Some(list) = &answer.revocation_list_pem {
        credentials = credentials.with_revocation_list(list).map_err(|e| failed(&e))?;
    }
    tls.reload(&credentials).map_err(|e| failed(&e))?;
    credentials.save(&files.pki).map_err(|e| failed(&e))
}
