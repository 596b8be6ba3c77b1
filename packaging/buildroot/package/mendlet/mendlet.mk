################################################################################
#
# mendlet
#
################################################################################

# This tree is part of the source of a release, with what it depends on in vendor/.
MENDLET_SITE = $(realpath $(BR2_EXTERNAL_MENDLET_PATH)/../..)
MENDLET_SITE_METHOD = local
MENDLET_VERSION = $(shell cat $(MENDLET_SITE)/VERSION)
MENDLET_LICENSE = Apache-2.0, BSD-3-Clause (xz)
MENDLET_LICENSE_FILES = LICENSE vendor/github.com/ulikunitz/xz/LICENSE
MENDLET_GOMOD = mendlet

MENDLET_MAKE_OPTS = \
	VERSION=$(MENDLET_VERSION) \
	EXTRATAGS=$(if $(BR2_PACKAGE_MENDLET_NET),,$(comma)nonet)$(if $(BR2_PACKAGE_MENDLET_DBUS),,$(comma)nodbus)

# Its Makefile builds it without cgo, not as PIE, and smaller than the flags of the infrastructure would.
define MENDLET_BUILD_CMDS
	$(HOST_GO_TARGET_ENV) $(MAKE) -C $(@D) GO=$(GO_BIN) $(MENDLET_MAKE_OPTS) mendlet
endef

define MENDLET_INSTALL_TARGET_CMDS
	$(MAKE) -C $(@D) -o mendlet DESTDIR=$(TARGET_DIR) INIT=none install \
		$(if $(BR2_PACKAGE_MENDLET_MODULES),install-modules) \
		$(if $(BR2_PACKAGE_MENDLET_MENDER),install-mender)
endef

ifeq ($(BR2_PACKAGE_MENDLET_INIT),y)
define MENDLET_INSTALL_INIT_SYSTEMD
	$(MAKE) -C $(@D) DESTDIR=$(TARGET_DIR) INIT=systemd \
		$(if $(BR2_PACKAGE_MENDLET_MENDER),install-mender,install-init)
endef

define MENDLET_INSTALL_INIT_OPENRC
	$(MAKE) -C $(@D) DESTDIR=$(TARGET_DIR) INIT=openrc install-init
endef

define MENDLET_INSTALL_INIT_SYSV
	$(INSTALL) -D -m 0755 $(@D)/packaging/mendlet.sysv \
		$(TARGET_DIR)/etc/init.d/S99mendlet
endef
endif

$(eval $(golang-package))
