//! Where to go and with whose keys: options first, then the environment, then the AWS profile files.

use std::time::Duration;

use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::imds;
use aws_config::meta::region::ProvideRegion;
use aws_config::profile::{ProfileFileCredentialsProvider, ProfileFileRegionProvider};
use aws_credential_types::Credentials;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Region, RequestChecksumCalculation, ResponseChecksumValidation, StalledStreamProtectionConfig,
};

use super::http::{self, Trust};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{StaticCredentials, StoreOptions};

/// How long the search for credentials may take: some sources ask other hosts, which may not answer.
const CREDENTIALS_TIMEOUT: Duration = Duration::from_secs(5);

/// What options and environment say, before any file is read.
#[derive(Debug, PartialEq, Eq)]
struct Settings {
    endpoint: Option<String>,
    region: Option<String>,
    keys: Option<StaticCredentials>,
}

impl Settings {
    /// `AWS_HOST`, `AWS_ACCESS_KEY` and `AWS_SECRET_KEY` are the seed platform's names; the usual ones go before them.
    fn resolve(opts: &StoreOptions, env: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let first = |names: &[&str]| names.iter().find_map(|n| env(n).filter(|v| !v.is_empty()));
        let endpoint = opts
            .endpoint
            .clone()
            .or_else(|| first(&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_HOST"]))
            .map(|e| checked_endpoint(&e))
            .transpose()?;
        let keys = match (&opts.credentials, &opts.profile) {
            (Some(given), _) => Some(given.clone()),
            // A profile that was asked for goes before keys that happen to be in the environment.
            (None, Some(_)) => None,
            (None, None) => match (first(&["AWS_ACCESS_KEY_ID"]), first(&["AWS_ACCESS_KEY"])) {
                (None, Some(access_key)) => {
                    let secret_key = first(&["AWS_SECRET_KEY", "AWS_SECRET_ACCESS_KEY"]).ok_or_else(|| {
                        Error::new(ErrorKind::Denied, "AWS_ACCESS_KEY is set, but AWS_SECRET_KEY is not: set it too")
                    })?;
                    let session_token = first(&["AWS_SESSION_TOKEN"]);
                    Some(StaticCredentials { access_key, secret_key, session_token })
                }
                _ => None,
            },
        };
        let region = opts.region.clone();
        let region = match &opts.profile {
            Some(_) => region,
            None => region.or_else(|| first(&["AWS_REGION", "AWS_DEFAULT_REGION"])),
        };
        Ok(Self { endpoint, region, keys })
    }
}

/// An endpoint as a URL; a bare `host:port` means https.
fn checked_endpoint(given: &str) -> Result<String> {
    let url = if given.contains("://") { given.to_owned() } else { format!("https://{given}") };
    let host = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
    match host.map(|h| h.trim_end_matches('/')) {
        Some(h) if !h.is_empty() && !h.contains(['?', '#', '@', ' ']) && url.is_ascii() => {
            Ok(url.trim_end_matches('/').to_owned())
        }
        _ => Err(Error::new(
            ErrorKind::Usage,
            format!("the endpoint {given:?} is no good: give http://HOST[:PORT] or https://HOST[:PORT]"),
        )),
    }
}

/// Makes a client; also says where requests go, for messages.
pub(super) async fn client(opts: &StoreOptions) -> Result<(Client, String)> {
    let settings = Settings::resolve(opts, |name| std::env::var(name).ok())?;
    let trust = match (&opts.ca_cert, opts.insecure) {
        (_, true) => Trust::Anybody,
        (Some(path), false) => Trust::from_file(path)?,
        (None, false) => Trust::System,
    };
    let region = match &settings.region {
        Some(name) => Some(Region::new(name.clone())),
        None => {
            let mut profile = ProfileFileRegionProvider::builder();
            if let Some(name) = &opts.profile {
                profile = profile.profile_name(name);
            }
            profile.build().region().await
        }
    };
    let region = match (region, &settings.endpoint) {
        (Some(region), _) => region,
        (None, Some(_)) => Region::new("us-east-1"),
        (None, None) => {
            return Err(Error::new(
                ErrorKind::Usage,
                "no region is known: give --region, set AWS_REGION, or give --endpoint for a server other than AWS",
            ));
        }
    };
    let credentials = credentials(opts, &settings, &region).await?;

    let mut config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .http_client(http::client(trust))
        .credentials_provider(credentials)
        .region(region.clone())
        .retry_config(RetryConfig::disabled())
        .timeout_config(
            TimeoutConfig::builder()
                .connect_timeout(opts.connect_timeout)
                .read_timeout(opts.request_timeout)
                .operation_attempt_timeout(opts.request_timeout)
                .build(),
        )
        // The whole request is bounded in time already.
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        // Many servers know no checksum headers or trailers; the engine checks its own.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
    let endpoint = match &settings.endpoint {
        Some(url) => {
            config = config.endpoint_url(url).force_path_style(true);
            url.clone()
        }
        None => format!("AWS {region}"),
    };
    Ok((Client::from_conf(config.build()), endpoint))
}

/// Finds credentials, and makes sure now that they are there.
async fn credentials(opts: &StoreOptions, settings: &Settings, region: &Region) -> Result<SharedCredentialsProvider> {
    let search = async {
        if let Some(keys) = &settings.keys {
            return SharedCredentialsProvider::new(Credentials::new(
                &keys.access_key,
                &keys.secret_key,
                keys.session_token.clone(),
                None,
                "vb-ublk",
            ));
        }
        if let Some(name) = &opts.profile {
            return SharedCredentialsProvider::new(
                ProfileFileCredentialsProvider::builder().profile_name(name).build(),
            );
        }
        // Off AWS nobody answers at the metadata address: one short try.
        let metadata = imds::Client::builder()
            .max_attempts(1)
            .connect_timeout(Duration::from_secs(1))
            .read_timeout(Duration::from_secs(1))
            .build();
        SharedCredentialsProvider::new(
            DefaultCredentialsChain::builder().imds_client(metadata).region(region.clone()).build().await,
        )
    };
    let found = async {
        let provider = search.await;
        provider.provide_credentials().await.map(|_| provider.clone())
    };
    let hint = match &opts.profile {
        Some(name) => format!("no credentials found in the profile {name}: check ~/.aws/credentials or --profile"),
        None => "no credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give --profile".to_owned(),
    };
    match tokio::time::timeout(CREDENTIALS_TIMEOUT, found).await {
        Ok(Ok(provider)) => Ok(provider),
        Ok(Err(e)) => Err(Error::new(ErrorKind::Denied, hint).with_source(e)),
        Err(_) => Err(Error::new(ErrorKind::Denied, format!("{hint} (the search took longer than 5 s)"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(opts: &StoreOptions, env: &[(&str, &str)]) -> Result<Settings> {
        Settings::resolve(opts, |n| env.iter().find(|(k, _)| *k == n).map(|(_, v)| (*v).to_owned()))
    }

    #[test]
    fn options_go_before_the_environment_and_the_usual_names_before_the_seeds() {
        let none = StoreOptions::default();
        let seed = [("AWS_HOST", "10.0.0.1:8443"), ("AWS_ACCESS_KEY", "A"), ("AWS_SECRET_KEY", "S")];
        let s = resolve(&none, &seed).expect("seed names");
        assert_eq!(s.endpoint.as_deref(), Some("https://10.0.0.1:8443"));
        assert_eq!(s.keys.map(|k| (k.access_key, k.secret_key)), Some(("A".into(), "S".into())));

        let both = [&seed[..], &[("AWS_ENDPOINT_URL", "http://e/"), ("AWS_ACCESS_KEY_ID", "B"), ("AWS_REGION", "r")]];
        let s = resolve(&none, &both.concat()).expect("both");
        assert_eq!(s.endpoint.as_deref(), Some("http://e"));
        assert_eq!((s.keys, s.region.as_deref()), (None, Some("r")));

        let opts = StoreOptions {
            endpoint: Some("http://o:1".into()),
            region: Some("q".into()),
            profile: Some("p".into()),
            ..none.clone()
        };
        let s = resolve(&opts, &both.concat()).expect("options");
        assert_eq!((s.endpoint.as_deref(), s.region.as_deref(), s.keys), (Some("http://o:1"), Some("q"), None));

        let e = resolve(&none, &[("AWS_ACCESS_KEY", "A")]).expect_err("half a pair");
        assert!(e.to_string().contains("AWS_SECRET_KEY"), "{e}");
    }

    #[test]
    fn bad_endpoints_are_refused() {
        for bad in ["", "ftp://x", "http://", "http://a b", "https://u@h"] {
            assert_eq!(checked_endpoint(bad).expect_err(bad).kind(), ErrorKind::Usage);
        }
    }
}
