//! How machines join, are told of each other, renew their certificates and are removed.
//!
//! Every full node holds the authority's key: of two nodes either may be lost for good, and the other must be able
//! to admit its replacement. A witness never holds it.
//!
//! The revocation list changes only together with the list of members, so that one version orders both.

use crate::http::{AuthorityFiles, EnrolAnswer, EnrolRequest, PeerClient, exchange};
use crate::links;
use crate::members::{Cluster, MemberRecord};
use crate::node::Node;
use crate::{config, durable};
use rempart_api::{Error, MemberRole, Members, Token, TokenRequest};
use rempart_transport::pki::{Authority, CertificateRequest, Credentials, Validity};
use rempart_transport::{ClusterId, Deadlines, EnrolmentToken, Identity, Peer, Role, Secret, dial_enrolment};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Members are told of changes at once, and asked again this often.
const GOSSIP_EVERY: Duration = Duration::from_secs(30);

/// What nodes tell each other about the cluster.
#[derive(Clone, Serialize, Deserialize)]
pub struct News {
    pub cluster: Cluster,
    pub revocation_list_pem: Option<String>,
    pub authority: AuthorityFiles,
}

/// A member asks for the newest revocation list and, if it likes, a certificate for a new key.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Renewal {
    pub request_pem: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RenewalAnswer {
    pub certificate_pem: Option<String>,
    pub revocation_list_pem: Option<String>,
}

fn failed(what: &str) -> impl Fn(&dyn std::fmt::Display) -> Error {
    let what = what.to_owned();
    move |cause| Error::failed(format!("cannot {what}")).cause(cause)
}

/// Makes this node the first of a new cluster.
pub async fn create(node: &Arc<Node>, name: &str) -> Result<Members, Error> {
    config::check_name(name).map_err(Error::invalid)?;
    let mut membership = node.membership.lock().await;
    refuse_if_member(node)?;
    let failed = failed("create the cluster");
    let id = ClusterId(crate::identity::random_u128().map_err(|e| failed(&e))?);
    let mut authority = Authority::create(id, node.now()).map_err(|e| failed(&e))?;
    let list = authority.revocation_list(node.now()).map_err(|e| failed(&e))?;
    let credentials = own_credentials(node, &mut authority, &list).map_err(|e| failed(&e))?;
    authority.save(&node.paths.authority()).map_err(|e| failed(&e))?;
    let mut cluster = Cluster { id: id.to_string(), name: name.to_owned(), version: 0, members: Vec::new() };
    cluster.put(MemberRecord {
        id: node.id(),
        name: node.name().to_owned(),
        role: MemberRole::Node,
        address: node.config.advertised(),
    });
    node.adopt_membership(Some(&credentials), cluster)?;
    membership.authority = Some(authority);
    node.members()
}

fn refuse_if_member(node: &Node) -> Result<(), Error> {
    match node.cluster() {
        None => Ok(()),
        Some(cluster) => {
            Err(Error::conflict(format!("node `{}` is in cluster `{}` already", node.name(), cluster.name)))
        }
    }
}

fn own_credentials(
    node: &Node,
    authority: &mut Authority,
    revocation_list: &str,
) -> Result<Credentials, rempart_transport::Error> {
    let request = CertificateRequest::generate()?;
    let identity = Identity { cluster: authority.cluster(), role: Role::Node, id: node.id() };
    let certificate = authority.issue(&request.request_pem, identity, Validity::usual(node.now()))?;
    Credentials::new(request.key, &certificate, authority.certificate_pem(), Some(revocation_list))
}

fn current_revocation_list(node: &Node) -> Result<Option<String>, Error> {
    let credentials = Credentials::load(&node.paths.pki()).map_err(|e| failed("read the certificate")(&e))?;
    Ok(credentials.revocation_list_pem().map(str::to_owned))
}

fn no_authority() -> Error {
    Error::failed("this node does not hold the cluster's authority").hint("run it on another node")
}

/// A one-time token for another machine.
pub async fn token(node: &Arc<Node>, request: TokenRequest) -> Result<Token, Error> {
    let mut membership = node.membership.lock().await;
    let (cluster, _) = node.cluster_or_refuse()?;
    if request.role == MemberRole::Witness {
        refuse_second_witness(&cluster)?;
    }
    // The issuer holds the token's hash: only it can redeem it.
    let addresses = vec![node.config.advertised()];
    let (id, pin) = membership.authority.as_ref().map(|a| (a.cluster(), a.pin())).ok_or_else(no_authority)?;
    let lifetime = Duration::from_secs(request.valid_s);
    let token = membership
        .tokens
        .create(id, addresses, pin, transport_role(request.role), lifetime, node.now())
        .map_err(|e| failed("make a token")(&e))?;
    Ok(Token { token: token.to_string(), expires_unix_s: token.expires.0 / 1000 })
}

fn refuse_second_witness(cluster: &Cluster) -> Result<(), Error> {
    match cluster.witness() {
        None => Ok(()),
        Some(witness) => Err(Error::conflict(format!("the cluster has a witness, `{}`", witness.name))
            .hint(format!("to replace a lost one, first `rempart cluster remove {}`", witness.name))),
    }
}

pub fn transport_role(role: MemberRole) -> Role {
    match role {
        MemberRole::Node => Role::Node,
        MemberRole::Witness => Role::Witness,
    }
}

/// What joining with a token gave.
pub struct Joined {
    pub credentials: Credentials,
    pub answer: EnrolAnswer,
}

/// Shows a token to the node that issued it, and gets a certificate for a fresh key. Used by nodes and witnesses.
pub async fn enrol(token: &EnrolmentToken, me: MemberRecord) -> Result<Joined, Error> {
    let role = transport_role(me.role);
    if token.role != role {
        return Err(Error::invalid(format!("this token admits a {}, and this is a {role}", token.role)));
    }
    let request = CertificateRequest::generate().map_err(|e| failed("make a key")(&e))?;
    let body = serde_json::to_vec(&EnrolRequest {
        secret: token.secret.to_secret_hex(),
        id: me.id,
        name: me.name,
        role: me.role,
        address: me.address,
        request_pem: request.request_pem,
    })
    .map_err(|e| failed("write the request")(&e))?;
    let mut last = Error::unreachable("the token names no address");
    for address in &token.addresses {
        let away = |cause: String| {
            Error::unreachable(format!("cannot reach the cluster at `{address}`")).cause(cause)
        };
        let socket = match links::resolve(address).await {
            Ok(socket) => socket,
            Err(error) => {
                last = away(error);
                continue;
            }
        };
        let stream = match dial_enrolment(socket, token.cluster, token.pin, Deadlines::default()).await {
            Ok(stream) => stream,
            Err(error) => {
                last = away(error.to_string());
                continue;
            }
        };
        let asked = exchange(stream, hyper::Method::POST, "/join/v1", body.clone().into());
        let text = match tokio::time::timeout(Duration::from_secs(30), asked).await {
            Ok(Ok(text)) => text,
            // It answered: another address would not say otherwise.
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                last = away("no answer within 30 s".into());
                continue;
            }
        };
        let answer: EnrolAnswer =
            serde_json::from_slice(&text).map_err(|e| failed("read the cluster's answer")(&e))?;
        let credentials = Credentials::new(
            request.key,
            &answer.certificate_pem,
            &answer.ca_pem,
            answer.revocation_list_pem.as_deref(),
        )
        .map_err(|e| failed("use the certificate that the cluster gave")(&e))?;
        if credentials.pin() != token.pin {
            return Err(Error::refused("the cluster answered with another authority than the token names"));
        }
        return Ok(Joined { credentials, answer });
    }
    Err(last)
}

/// Makes this node a member of the cluster that made the token.
pub async fn join(node: &Arc<Node>, token: &str) -> Result<Members, Error> {
    let token: EnrolmentToken =
        token.parse().map_err(|e: rempart_transport::Error| Error::invalid("this is no token").cause(e))?;
    let mut membership = node.membership.lock().await;
    refuse_if_member(node)?;
    let me = MemberRecord {
        id: node.id(),
        name: node.name().to_owned(),
        role: MemberRole::Node,
        address: node.config.advertised(),
    };
    let Joined { credentials, answer } = enrol(&token, me).await?;
    let files =
        answer.authority.ok_or_else(|| Error::failed("the cluster gave no authority to this node"))?;
    write_authority(&node.paths.authority(), &files)?;
    let authority =
        Authority::load(&node.paths.authority()).map_err(|e| failed("use the authority's key")(&e))?;
    node.adopt_membership(Some(&credentials), answer.cluster)?;
    membership.authority = Some(authority);
    node.members()
}

/// The other side of [`enrol`].
pub async fn admit(node: &Arc<Node>, request: EnrolRequest) -> Result<EnrolAnswer, Error> {
    let mut membership = node.membership.lock().await;
    let (mut cluster, _) = node.cluster_or_refuse()?;
    config::check_name(&request.name).map_err(Error::invalid)?;
    let secret = Secret::from_hex(&request.secret)
        .map_err(|e| Error::invalid("this is no token's secret").cause(e))?;
    // The token first: a stranger without one learns nothing about the cluster.
    let role = transport_role(request.role);
    let refused = |e: rempart_transport::Error| {
        Error::new(rempart_api::ErrorKind::Forbidden, "the token is not accepted")
            .cause(e)
            .hint("make a new one with `rempart cluster token`")
    };
    let conflict = |cluster: &Cluster| -> Result<(), Error> {
        if let Some(other) = cluster.by_name(&request.name).filter(|other| other.id != request.id) {
            let hint = format!(
                "choose another name, or first `rempart cluster remove {}` if it is gone",
                other.name
            );
            return Err(
                Error::conflict(format!("the cluster has a member `{}` already", other.name)).hint(hint)
            );
        }
        if request.role == MemberRole::Witness { refuse_second_witness(cluster) } else { Ok(()) }
    };
    membership.tokens.check(&secret, role, node.now()).map_err(refused)?;
    conflict(&cluster)?;
    membership.tokens.redeem(&secret, role, request.id, node.now()).map_err(refused)?;
    let failed = failed("admit the machine");
    let authority = membership.authority.as_mut().ok_or_else(no_authority)?;
    let identity = Identity { cluster: authority.cluster(), role, id: request.id };
    let certificate_pem = authority
        .issue(&request.request_pem, identity, Validity::usual(node.now()))
        .map_err(|e| Error::invalid("the certificate request is not usable").cause(e))?;
    authority.save(&node.paths.authority()).map_err(|e| failed(&e))?;
    let revocation_list = current_revocation_list(node)?;
    let ca_pem = authority.certificate_pem().to_owned();
    cluster.put(MemberRecord {
        id: request.id,
        name: request.name.clone(),
        role: request.role,
        address: request.address.clone(),
    });
    node.adopt_membership(None, cluster.clone())?;
    drop(membership);
    tracing::info!(member = request.name, %role, "admitted to the cluster");
    let authority = match request.role {
        MemberRole::Node => Some(read_authority(&node.paths.authority())?),
        MemberRole::Witness => None,
    };
    // The newcomer hears it in its answer; the others now.
    tokio::spawn(gossip_once(node.clone(), Some(request.id)));
    Ok(EnrolAnswer { certificate_pem, ca_pem, revocation_list_pem: revocation_list, cluster, authority })
}

fn write_authority(directory: &Path, files: &AuthorityFiles) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt;
    let failed = failed("save the authority");
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(|e| failed(&e))?;
    for (name, text) in files.named() {
        durable::write(&directory.join(name), text.as_bytes()).map_err(|e| failed(&e))?;
    }
    Ok(())
}

fn read_authority(directory: &Path) -> Result<AuthorityFiles, Error> {
    AuthorityFiles::read(directory).map_err(|e| failed("read the authority")(&e))
}

/// Removes a lost or replaced member and revokes its certificate everywhere.
pub async fn remove(node: &Arc<Node>, name: &str) -> Result<Members, Error> {
    let mut membership = node.membership.lock().await;
    let (mut cluster, _) = node.cluster_or_refuse()?;
    let member = cluster.by_name(name).cloned().ok_or_else(|| {
        Error::not_found(format!("the cluster has no member `{name}`"))
            .hint("`rempart cluster members` lists them")
    })?;
    if member.id == node.id() {
        return Err(Error::refused("a node cannot remove itself").hint("run it on a node that stays"));
    }
    if let Some(vm) = node.vms().iter().find(|vm| vm.peers().contains(&member.id)) {
        let vm = vm.name();
        return Err(Error::refused(format!("cannot remove `{name}`: it keeps a copy of `{vm}`"))
            .hint(format!("run `rempart unprotect {vm}` first")));
    }
    if let Some((vm, why)) = node.unopened().into_iter().next() {
        let what = format!(
            "cannot remove `{name}`: whether it keeps a copy of `{vm}`, which was not opened, is not known"
        );
        return Err(Error::refused(what)
            .cause(&why)
            .hint("mend what the cause names and restart the daemon"));
    }
    let failed = failed("remove the member");
    let authority = membership.authority.as_mut().ok_or_else(no_authority)?;
    let identity =
        Identity { cluster: authority.cluster(), role: transport_role(member.role), id: member.id };
    authority.revoke(identity, node.now());
    let list = authority.revocation_list(node.now()).map_err(|e| failed(&e))?;
    authority.save(&node.paths.authority()).map_err(|e| failed(&e))?;
    cluster.remove(member.id);
    let credentials = Credentials::load(&node.paths.pki())
        .and_then(|credentials| credentials.with_revocation_list(&list))
        .map_err(|e| failed(&e))?;
    node.adopt_membership(Some(&credentials), cluster)?;
    drop(membership);
    tokio::spawn(gossip_once(node.clone(), None));
    node.members()
}

/// Draws a new key for this node and certifies it.
pub async fn renew(node: &Arc<Node>) -> Result<Members, Error> {
    let mut membership = node.membership.lock().await;
    let (cluster, _) = node.cluster_or_refuse()?;
    let failed = failed("renew the certificate");
    let authority = membership.authority.as_mut().ok_or_else(no_authority)?;
    let list = current_revocation_list(node)?.ok_or_else(|| failed(&"there is no revocation list"))?;
    let credentials = own_credentials(node, authority, &list).map_err(|e| failed(&e))?;
    authority.save(&node.paths.authority()).map_err(|e| failed(&e))?;
    node.adopt_membership(Some(&credentials), cluster)?;
    drop(membership);
    node.members()
}

/// A member that has no authority asks for a new certificate.
pub async fn certify_again(node: &Arc<Node>, peer: &Peer, request: Renewal) -> Result<RenewalAnswer, Error> {
    let mut membership = node.membership.lock().await;
    let failed = failed("certify again");
    let authority = membership.authority.as_mut().ok_or_else(no_authority)?;
    let certificate_pem = match request.request_pem {
        Some(request) => {
            let issued = authority.issue(&request, peer.identity, Validity::usual(node.now()));
            Some(issued.map_err(|e| Error::invalid("the certificate request is not usable").cause(e))?)
        }
        None => None,
    };
    if certificate_pem.is_some() {
        authority.save(&node.paths.authority()).map_err(|e| failed(&e))?;
    }
    let revocation_list_pem = current_revocation_list(node)?;
    Ok(RenewalAnswer { certificate_pem, revocation_list_pem })
}

/// Takes a peer's news if they are newer; answers ours if they are older.
pub async fn hear(node: &Arc<Node>, news: News) -> Result<Option<Cluster>, Error> {
    let mut membership = node.membership.lock().await;
    let (ours, _) = node.cluster_or_refuse()?;
    if news.cluster.id != ours.id {
        return Err(Error::refused("these are news of another cluster"));
    }
    if news.cluster.version <= ours.version {
        return Ok((news.cluster.version < ours.version).then_some(ours));
    }
    let failed = failed("take the list of members");
    let mut credentials = Credentials::load(&node.paths.pki()).map_err(|e| failed(&e))?;
    if let Some(list) = &news.revocation_list_pem {
        credentials = credentials.with_revocation_list(list).map_err(|e| failed(&e))?;
    }
    write_authority(&node.paths.authority(), &news.authority)?;
    membership.authority = Some(Authority::load(&node.paths.authority()).map_err(|e| failed(&e))?);
    node.adopt_membership(Some(&credentials), news.cluster)?;
    Ok(None)
}

/// Tells every other node what this one knows.
async fn gossip_once(node: Arc<Node>, except: Option<rempart_types::NodeId>) {
    let Some(cluster) = node.cluster() else { return };
    let (Ok(authority), Ok(credentials)) =
        (read_authority(&node.paths.authority()), Credentials::load(&node.paths.pki()))
    else {
        tracing::error!("the authority or the certificate cannot be read");
        return;
    };
    let revocation_list_pem = credentials.revocation_list_pem().map(str::to_owned);
    let others: Vec<_> =
        cluster.nodes().filter(|m| m.id != node.id() && Some(m.id) != except).cloned().collect();
    let news = News { cluster, revocation_list_pem, authority };
    for member in others {
        let Ok(client) = PeerClient::new(&node, member.id) else { return };
        // A member that is away hears it at its next chance.
        if let Err(error) = client.post::<_, Option<Cluster>>("/peer/v1/members", &news).await {
            tracing::info!(member = member.name, %error, "not told of the members");
        }
    }
}

/// Tells and renews for as long as the daemon runs.
pub async fn keep(node: Arc<Node>) {
    let mut ticks = tokio::time::interval(GOSSIP_EVERY);
    loop {
        ticks.tick().await;
        if node.cluster().is_none() {
            continue;
        }
        gossip_once(node.clone(), None).await;
        let due = Credentials::load(&node.paths.pki())
            .and_then(|credentials| credentials.info())
            .is_ok_and(|info| info.renewal_due(node.now()));
        if due {
            match renew(&node).await {
                Ok(_) => tracing::info!("certificate renewed"),
                Err(error) => tracing::error!(%error, "certificate not renewed"),
            }
        }
    }
}
